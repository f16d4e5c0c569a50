"""Quantized modules are called like any other: text is that of the quantized model itself."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.bridges import fit_bridges
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.families import FAMILIES
from layerskip.fingerprint import fingerprint
from tests.models import LAYERS, VOCABULARY, WINDOW, near_tie_or_same, tiny_llama, tiny_model, transformers_greedy

TEXT = torch.randint(VOCABULARY, (4 * WINDOW,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT = TEXT[: 2 * WINDOW]
SKIPPED = SkipSet(LAYERS, (2,), (1,))


def in_int8(hf_model):
    """All linear layers with int8 weights, the head too."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(hf_model, quantization.Int8WeightOnlyConfig())
    return hf_model


@torch.inference_mode()
def logits_of(hf_model):
    return hf_model(torch.tensor([TEXT])).logits[0]


@torch.inference_mode()
def our_logits_of(model):
    return model.logits(model.forward(torch.tensor(TEXT), model.new_cache(0)))


def assert_same_text(model, **draft):
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(3)), DraftWeights(**draft))
    ours = generate(model, PROMPT, drafter=drafter, max_new_tokens=24, eos_token_ids=())
    near_tie_or_same(model.hf_model, PROMPT, ours.tokens, transformers_greedy(model.hf_model, PROMPT, 24))
    assert ours.stats.drafted > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_int8_weights_decodes_as_transformers_decodes_it(family):
    before = logits_of(tiny_model(family))
    hf_model = in_int8(tiny_model(family))
    assert (logits_of(hf_model) - before).abs().max() > 1e-3
    model = LayerSkipModel(hf_model)
    torch.testing.assert_close(our_logits_of(model), logits_of(hf_model), atol=1e-4, rtol=1e-5)
    assert_same_text(model)


def test_a_draft_vocabulary_scores_as_the_quantized_head_does():
    model, chosen = LayerSkipModel(in_int8(tiny_llama())), torch.arange(3, 40)
    with torch.inference_mode():
        x = model.forward(torch.tensor(TEXT), model.new_cache(0), SKIPPED)
        some = model.logits(x, model.stack_of(SKIPPED, token_ids=chosen))
        torch.testing.assert_close(some, model.logits(x)[:, chosen], atol=1e-4, rtol=1e-5)
    assert_same_text(model, token_ids=chosen)


class InBuffers(torch.nn.Module):
    """A linear layer without a parameter, as those of GPTQ and AWQ are."""

    def __init__(self, linear):
        super().__init__()
        self.scale = torch.nn.Buffer(linear.weight.detach().abs().amax() / 127)
        self.qweight = torch.nn.Buffer((linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight * self.scale).T


def test_a_model_whose_weights_are_buffers_decodes_as_transformers_decodes_it():
    hf_model = tiny_llama()
    for name, module in list(hf_model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            hf_model.set_submodule(name, InBuffers(module))
    model = LayerSkipModel(hf_model)
    plain = LayerSkipModel(tiny_llama())
    for ours, whole in zip(model.sublayers, plain.sublayers, strict=True):
        assert ours.num_weights >= whole.num_weights  # what bridges and predictions weigh them by
    torch.testing.assert_close(our_logits_of(model), logits_of(hf_model), atol=1e-4, rtol=1e-5)
    assert_same_text(model, token_ids=torch.arange(3, 40))


def test_bridges_can_be_fitted_to_a_quantized_model():
    model = LayerSkipModel(in_int8(tiny_llama(intermediate_size=256)))
    bridges = fit_bridges(model, [TEXT, TEXT[::-1]], SKIPPED)
    assert bridges
    assert_same_text(model, bridges=bridges)


def test_a_fingerprint_tells_quantized_weights_from_the_plain_ones_and_from_each_other():
    prints = [fingerprint(LayerSkipModel(model)) for model in (tiny_llama(), in_int8(tiny_llama()))]
    prints.append(fingerprint(LayerSkipModel(in_int8(tiny_llama(seed=1)))))
    assert len(set(prints)) == 3
    assert fingerprint(LayerSkipModel(in_int8(tiny_llama()))) == prints[1]


BITS = {"8 bits": {"load_in_8bit": True}, "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


@pytest.fixture(params=BITS.values(), ids=BITS)
def by_bitsandbytes(request, tmp_path):
    """Loaded as transformers loads it; sizes are multiples of the blocks that bitsandbytes quantizes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=256, head_dim=16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**request.param)
    hf_model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    return hf_model.eval()


def test_a_model_quantized_by_bitsandbytes_decodes_as_transformers_decodes_it(by_bitsandbytes):
    model = LayerSkipModel(by_bitsandbytes)
    torch.testing.assert_close(our_logits_of(model), logits_of(by_bitsandbytes), atol=1e-4, rtol=1e-5)
    bridges = fit_bridges(model, [TEXT, TEXT[::-1]], SKIPPED)
    assert_same_text(model, bridges=bridges, token_ids=torch.arange(3, 40))


def test_a_fingerprint_tells_the_scales_that_bitsandbytes_keeps(by_bitsandbytes):
    model = LayerSkipModel(by_bitsandbytes)
    before = fingerprint(model)
    weight = by_bitsandbytes.model.layers[2].mlp.up_proj.weight
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else weight.quant_state.absmax
    scales *= 2
    assert fingerprint(model) != before
