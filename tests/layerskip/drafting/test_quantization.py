"""Copies at lower precision compute nearly what the sublayers do and share the rest with them, or say why not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting import quantized_linear
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.quantized_linear import Int4Linear, Int8Linear
from layerskip.drafting.rounding import GROUP, rounded_to_int4, rounded_to_int8
from layerskip.engine import EagerEngine
from layerskip.errors import InvalidInputError
from layerskip.sublayers import AttentionSublayer
from tests.models import LAYERS, VOCABULARY, tiny_llama, tiny_model
from tests.strategies import low_precisions, skip_sets, tokens

NOTHING = SkipSet(LAYERS)
KINDS = {"int8": Int8Linear, "int4": Int4Linear}
TEXT = torch.arange(3, 23)


def weights(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# Rounding.


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_8_bits_are_off_by_half_a_step_of_their_row(rows, columns, seed):
    weight = weights(rows, columns, seed)
    numbers, scales = rounded_to_int8(weight)
    steps = weight.abs().amax(1, keepdim=True) / 127
    # A scale in bfloat16 is off by a 256th, which is half a step more at the largest number.
    assert ((numbers * scales[:, None].float() - weight).abs() <= 1.01 * steps).all()


@given(st.integers(0, 99))
@settings(max_examples=10)
def test_4_bits_are_nearer_than_those_from_the_least_to_the_greatest_weight_of_a_group(seed):
    weight = weights(64, 8 * GROUP, seed)
    numbers, scales, zeros = rounded_to_int4(weight)
    assert numbers.min() >= 0
    assert numbers.max() <= 15
    by_group = weight.unflatten(1, (-1, GROUP))
    least, greatest = by_group.amin(-1, keepdim=True), by_group.amax(-1, keepdim=True)
    step = (greatest - least) / 15
    simple = ((by_group - least) / step).round() * step + least
    found = (numbers.float().unflatten(1, (-1, GROUP)) - 8) * scales[..., None].float() + zeros[..., None].float()
    error, simple_error = ((rounded - by_group).square().sum() for rounded in (found, simple))
    assert error < 0.95 * simple_error


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_4_bits_are_off_by_a_step_of_their_group_at_most(rows, groups, seed):
    weight = weights(rows, GROUP * groups, seed)
    numbers, scales, zeros = rounded_to_int4(weight)
    found = (numbers.float().unflatten(1, (-1, GROUP)) - 8) * scales[..., None].float() + zeros[..., None].float()
    by_group = weight.unflatten(1, (-1, GROUP))
    steps = (by_group.amax(-1, keepdim=True) - by_group.amin(-1, keepdim=True)) / 15
    assert ((found - by_group).abs() <= 1.1 * steps).all()


def test_weights_that_have_4_bits_already_are_kept():
    """Such as those of a GGUF file, in groups of the same size."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (64, 4, GROUP), generator=generator).float()
    numbers[..., :2] = torch.tensor([0.0, 15.0])  # the whole range is in use
    weight = ((numbers - 8) * torch.rand(64, 4, 1, generator=generator)).flatten(1)
    found, scales, zeros = rounded_to_int4(weight)
    rounded = (found.float().unflatten(1, (-1, GROUP)) - 8) * scales[..., None].float() + zeros[..., None].float()
    assert (rounded.flatten(1) - weight).norm() < 0.005 * weight.norm()


def test_rows_of_one_number_are_kept():
    assert not rounded_to_int8(torch.zeros(2, 32))[0].any()
    numbers, scales, zeros = rounded_to_int4(torch.full((2, 32), 0.5))
    assert ((numbers.float() - 8) * scales.float() + zeros.float() == 0.5).all()


# Linear layers.


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(st.integers(1, 200), st.integers(1, 80), st.sampled_from([1, 3, 16, 17, 128, 129]), st.booleans())
@settings(max_examples=25)
def test_a_product_is_that_of_the_rounded_weight_for_any_size_and_width(kind, outputs, inputs, rows, biased):
    """Narrow passes run on the kernels, wide ones on dequantized weights."""
    bias = weights(1, outputs, seed=2)[0] if biased else None
    linear = kind(weights(outputs, inputs), bias, torch.float32)
    x = weights(rows, inputs, seed=1)
    expected = torch.nn.functional.linear(x, linear.dequantized(), bias)
    found = linear(x[None])
    assert found.shape == (1, rows, outputs)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kernels", [True, False])
def test_wide_passes_are_in_float32_where_the_processor_has_no_kernels_for_bfloat16(kind, kernels, monkeypatch):
    monkeypatch.setattr(quantized_linear, "has_kernels_for", lambda dtype: kernels)
    monkeypatch.setattr(quantized_linear, "_wide_dtype", quantized_linear._wide_dtype.__wrapped__)
    linear, x = kind(weights(96, 64), None, torch.float32), weights(200, 64, seed=1).bfloat16().float()
    expected = torch.nn.functional.linear(x, linear.dequantized())
    assert torch.allclose(linear(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max())) == (not kernels)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_bytes_are_known_before_a_layer_is_made(kind):
    assert kind(weights(128, 96), None, torch.float32).nbytes == kind.bytes_of(128, 96)
    assert Int4Linear.bytes_of(1, 1024) == 1024 * 0.625
    assert Int8Linear.bytes_of(1, 1024) == 1024 + 2


# Copies of sublayers.


@given(tokens(20), skip_sets(), low_precisions())
@settings(max_examples=8)
def test_a_draft_computes_what_a_model_with_the_rounded_weights_does(each_family, text, skip_set, precision):
    """Dequantized in a copy of the model, which transformers' modules then run."""
    rounded = LayerSkipModel(copy.deepcopy(each_family.hf_model))
    for part in (*_linears(rounded), rounded.hf_model.lm_head):
        kind = Int8Linear if part is rounded.hf_model.lm_head else KINDS[precision]
        part.weight = torch.nn.Parameter(kind(part.weight, None, torch.float32).dequantized(), requires_grad=False)
    ids = torch.tensor(text)
    with torch.inference_mode():
        expected = rounded.logits(rounded.forward(ids, rounded.new_cache(20), skip_set))
        stack = each_family.stack_of(skip_set, precision=precision)
        context = each_family.pass_context(len(ids), each_family.new_cache(20))
        found = each_family.logits(stack.run(each_family.embed(ids), context), stack)
    difference = (found - expected).norm() / expected.norm()
    assert difference < 0.1  # activations have the 8 bits of bfloat16


def _linears(model):
    parts = [s.attention if isinstance(s, AttentionSublayer) else s.mlp for s in model.sublayers]
    return [module for part in parts for module in part.modules() if isinstance(module, torch.nn.Linear)]


@given(tokens(8), low_precisions(), st.integers(2, 24))
@settings(max_examples=10)
def test_a_head_scores_a_draft_vocabulary_as_it_scores_the_whole(tiny, text, precision, size):
    chosen = torch.arange(3, 3 + size)
    whole, some = (tiny.stack_of(NOTHING, token_ids=ids, precision=precision) for ids in (None, chosen))
    with torch.inference_mode():
        x = tiny.forward(torch.tensor(text), tiny.new_cache(8))
        torch.testing.assert_close(tiny.logits(x, some), tiny.logits(x, whole)[:, chosen])


@given(skip_sets(), low_precisions())
@settings(max_examples=20)
def test_no_sublayer_of_a_draft_at_lower_precision_is_the_targets(tiny, skip_set, precision):
    """So that verification never goes on from what such a draft computed."""
    stack = tiny.stack_of(skip_set, precision=precision)
    assert stack.shared == 0
    assert tiny.stack_of(skip_set).shared == [*skip_set.mask, True].index(True)
    assert not {id(step) for _, step in stack.steps} & {id(step) for step in tiny.sublayers}
    assert [index for index, _ in stack.steps] == list(skip_set.kept)


def test_copies_share_norms_with_the_model_and_change_nothing_in_it(each_family):
    model = LayerSkipModel(each_family.hf_model)
    before = {name: (id(weight), weight._version) for name, weight in model.hf_model.named_parameters()}
    modules = [id(module) for module in model.hf_model.modules()]
    original, copied = model.sublayers[0], model.stack_of(NOTHING, precision="int4").steps[0][1]
    assert copied.after is original.after
    assert copied.num_weights == original.num_weights
    assert isinstance(original.attention.o_proj, torch.nn.Linear)
    assert {name: (id(weight), weight._version) for name, weight in model.hf_model.named_parameters()} == before
    assert [id(module) for module in model.hf_model.modules()] == modules


def test_copies_are_made_once_and_only_of_what_a_draft_runs():
    model = LayerSkipModel(tiny_llama(hidden_size=64, intermediate_size=128, head_dim=32, vocab_size=128))
    assert model.copies.nbytes == 0
    model.stack_of(SkipSet(LAYERS, (0, 1, 2, 3), (1, 2, 3)), precision="int8")
    mlp_and_head = 3 * 64 * 128 + 2 * (2 * 128 + 64) + 128 * (64 + 2)
    assert model.copies.nbytes == model.copies.bytes_needed("int8", [1]) == mlp_and_head
    first, again = (model.stack_of(NOTHING, precision="int8") for _ in range(2))
    assert [step for _, step in first.steps] == [step for _, step in again.steps]
    assert first.head is again.head
    assert model.copies.nbytes == model.copies.bytes_needed("int8")
    model.stack_of(NOTHING, precision="int4")  # with the same head
    both = model.copies.bytes_needed("int8") + model.copies.bytes_needed("int4")
    assert model.copies.nbytes == both - 128 * (64 + 2)
    assert model.copies.bytes_needed("full") == 0


def test_a_draft_writes_keys_and_values_that_verification_overwrites(tiny):
    """What the cache holds after a round is what plain decoding would have put there."""
    engine, stack = EagerEngine(tiny), tiny.stack_of(NOTHING, precision="int4")
    drafted = torch.tensor([5, 6, 7])
    caches = [engine.new_cache(30) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            engine.prefill(TEXT, cache)
        for token in drafted:
            engine.draft_step(token[None], caches[0], stack)
        written = [caches[0].layer(layer)[0].clone() for layer in range(LAYERS)]
        caches[0].rollback(len(TEXT))
        for cache in caches:
            engine.verify(drafted, cache)
    for layer in range(LAYERS):
        for ours, plain in zip(caches[0].layer(layer), caches[1].layer(layer), strict=True):
            assert torch.equal(ours, plain)
        assert not torch.equal(written[layer], caches[0].layer(layer)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_draft_at_lower_precision(dtype):
    model = LayerSkipModel(tiny_llama().to(dtype))
    for precision in KINDS:
        drafter = LayerSkipDrafter(model, DraftConfig(NOTHING, precision=precision, stopping=FixedLength(3)))
        assert generate(model, [1, 2, 3], drafter=drafter, max_new_tokens=12).stats.acceptance_rate > 0


def test_a_draft_at_lower_precision_may_run_bridges_and_biases_and_tied_heads():
    model = LayerSkipModel(tiny_model("qwen2", tie_word_embeddings=True))
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (2,), (2,)), precision="int8"))
    assert generate(model, [1, 2, 3], drafter=drafter, max_new_tokens=12).stats.drafted


# What cannot be copied.


class Packed(torch.nn.Module):
    """A linear layer without a plain weight, as those of GPTQ and AWQ are."""

    def __init__(self, linear):
        super().__init__()
        self.qweight = torch.nn.Buffer((linear.weight.detach() * 99).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight / 99).T


def test_a_model_that_is_quantized_already_says_so():
    hf_model = tiny_llama()
    for name, module in list(hf_model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            hf_model.set_submodule(name, Packed(module))
    model = LayerSkipModel(hf_model)
    assert model.copies.precisions == ("full",)
    with pytest.raises(InvalidInputError) as error:
        model.stack_of(NOTHING, precision="int4")
    assert str(error.value) == (
        "precision int4: a Packed has no plain weights (quantized already, or offloaded); draft at full precision, or "
        "load the model unquantized and in memory"
    )


def test_a_model_with_a_patched_module_says_so():
    hf_model = tiny_llama()
    hf_model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(InvalidInputError, match="precision int8: a LlamaMLP runs something else than its class does"):
        LayerSkipModel(hf_model).copies.check("int8")


def test_copies_of_a_model_on_several_devices_run_without_what_moves_its_inputs():
    hooks = pytest.importorskip("accelerate.hooks")
    hf_model = tiny_llama()
    expected = _draft_logits(LayerSkipModel(hf_model), "int4")
    for module in hf_model.model.layers.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    model = LayerSkipModel(hf_model)
    torch.testing.assert_close(_draft_logits(model, "int4"), expected)
    copied = model.stack_of(NOTHING, precision="int4").steps[0][1].attention
    assert "forward" not in vars(copied)
    assert "_hf_hook" in vars(model.sublayers[0].attention)


def test_a_device_without_kernels_has_no_lower_precision():
    assert LayerSkipModel(tiny_llama()).copies.precisions == ("full", "int8", "int4")
    with torch.device("meta"):
        model = LayerSkipModel(tiny_llama().to("meta"))
    assert model.copies.precisions == ("full",)


def test_an_adapter_is_merged_into_the_copies():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_llama(), config).eval()
    merged = LayerSkipModel(copy.deepcopy(adapted).merge_and_unload())
    model = LayerSkipModel(adapted)
    plain = LayerSkipModel(tiny_llama())
    with torch.inference_mode():
        found, expected, without = (_draft_logits(each, "int8") for each in (model, merged, plain))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        assert (found - without).abs().max() > 0.1
        with adapted.disable_adapter():
            torch.testing.assert_close(_draft_logits(LayerSkipModel(adapted), "int8"), without, atol=1e-3, rtol=1e-3)
    assert not any(getattr(module, "merged", False) for module in adapted.modules())


def _draft_logits(model, precision):
    stack = model.stack_of(NOTHING, precision=precision)
    context = model.pass_context(len(TEXT), model.new_cache(len(TEXT)))
    return model.logits(stack.run(model.embed(TEXT), context), stack)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_on_cuda_a_product_is_that_of_the_rounded_weight(kind):
    weight = weights(VOCABULARY, 256)
    on_cuda, on_cpu = (kind(weight.to(device), None, torch.float32) for device in ("cuda", "cpu"))
    for rows in (1, 4, 40):
        x = weights(rows, 256, seed=1)
        torch.testing.assert_close(on_cuda(x.cuda()).cpu(), on_cpu(x), rtol=0, atol=0.5)
