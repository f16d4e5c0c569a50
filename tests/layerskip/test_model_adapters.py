"""A PEFT model is decoded with its adapters, whichever are active, and refused where they would do nothing."""

import pytest
import torch

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate, speculate
from layerskip.drafting.bridges import fit_bridges
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import UnsupportedModelError
from layerskip.families import FAMILIES
from layerskip.fingerprint import fingerprint
from tests.layerskip.test_profile import profile_for
from tests.models import LAYERS, VOCABULARY, WINDOW, near_tie_or_same, tiny_llama, tiny_model, transformers_greedy

peft = pytest.importorskip("peft")

TEXT = torch.randint(VOCABULARY, (4 * WINDOW,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT = TEXT[: 2 * WINDOW]
SKIPPED = SkipSet(LAYERS, (2,), (1,))


def lora(**settings):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)


def adapted(family="llama", config=None, seed=0, **settings):
    """A tiny model with an adapter that changes what it says."""
    model = peft.get_peft_model(tiny_model(family, **settings), config or lora())
    randomize(model, seed)
    return model.eval()


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3, generator=generator)


@torch.inference_mode()
def logits_of(model):
    return model(input_ids=torch.tensor([TEXT])).logits[0]


@torch.inference_mode()
def our_logits_of(model):
    return model.logits(model.forward(torch.tensor(TEXT), model.new_cache(0)))


def assert_same_text(peft_model, model, **draft):
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(3)), DraftWeights(**draft))
    ours = generate(model, PROMPT, drafter=drafter, max_new_tokens=24, eos_token_ids=())
    near_tie_or_same(peft_model, PROMPT, ours.tokens, transformers_greedy(peft_model, PROMPT, 24))
    assert ours.stats.drafted > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_part_of_the_model(family):
    peft_model = adapted(family)
    with peft_model.disable_adapter():
        without = logits_of(peft_model)
    assert (logits_of(peft_model) - without).abs().max() > 0.1
    model = LayerSkipModel(peft_model)
    torch.testing.assert_close(our_logits_of(model), logits_of(peft_model), atol=1e-4, rtol=1e-5)
    assert_same_text(peft_model, model)


def test_the_base_of_a_peft_model_is_as_good_as_the_peft_model():
    peft_model = adapted()
    model = LayerSkipModel(peft_model.get_base_model())
    assert torch.equal(our_logits_of(model), our_logits_of(LayerSkipModel(peft_model)))


def test_a_model_that_transformers_gave_an_adapter_has_it():
    hf_model = tiny_llama()
    before = logits_of(hf_model)
    hf_model.add_adapter(lora())
    randomize(hf_model, 0)
    hf_model.eval()
    assert (logits_of(hf_model) - before).abs().max() > 0.1
    torch.testing.assert_close(our_logits_of(LayerSkipModel(hf_model)), logits_of(hf_model), atol=1e-4, rtol=1e-5)


def test_a_switched_adapter_counts_at_once():
    peft_model = adapted()
    peft_model.add_adapter("other", lora())
    randomize(peft_model, 3)
    model = LayerSkipModel(peft_model.eval())
    seen = []
    for name in ("default", "other"):
        peft_model.set_adapter(name)
        torch.testing.assert_close(our_logits_of(model), logits_of(peft_model), atol=1e-4, rtol=1e-5)
        seen.append(our_logits_of(model))
    assert (seen[0] - seen[1]).abs().max() > 0.1


def test_a_draft_vocabulary_scores_with_the_adapter_of_the_head():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    peft_model = adapted(config=config)
    model, chosen = LayerSkipModel(peft_model), torch.arange(3, 40)
    with torch.inference_mode():
        x = model.forward(torch.tensor(TEXT), model.new_cache(0), SKIPPED)
        some = model.logits(x, model.stack_of(SKIPPED, token_ids=chosen))
        torch.testing.assert_close(some, model.logits(x)[:, chosen], atol=1e-4, rtol=1e-5)
    assert_same_text(peft_model, model, token_ids=chosen)


def test_embeddings_and_head_may_be_saved_with_the_adapter():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"])
    peft_model = adapted(config=config)
    model = LayerSkipModel(peft_model)
    torch.testing.assert_close(our_logits_of(model), logits_of(peft_model), atol=1e-4, rtol=1e-5)
    assert_same_text(peft_model, model, token_ids=torch.arange(3, 40))


def test_bridges_can_be_fitted_to_an_adapted_model():
    peft_model = adapted(intermediate_size=256)
    model = LayerSkipModel(peft_model)
    bridges = fit_bridges(model, [TEXT, TEXT[::-1]], SKIPPED)
    assert bridges
    assert_same_text(peft_model, model, bridges=bridges)


def test_a_fingerprint_tells_adapters_apart_by_weights_scale_and_whether_they_are_on():
    plain = fingerprint(LayerSkipModel(tiny_llama()))
    first, other = adapted(), adapted(seed=1)
    stronger = adapted(config=peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    models = [first, other, stronger]
    prints = [fingerprint(LayerSkipModel(model)) for model in models]
    with first.disable_adapter():
        prints.append(fingerprint(LayerSkipModel(first)))
    assert len({plain, *prints}) == len(prints) + 1
    assert fingerprint(LayerSkipModel(adapted())) == prints[0]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (lambda: lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"), "activated LoRA"),
    ],
    ids=["prefix", "prompt", "activated-lora"],
)
def test_an_adapter_that_does_more_than_to_replace_modules_is_refused(config, kind):
    """By its model, and where that generates with the plain model inside it, whose profile would fit."""
    inner = tiny_llama()
    decode = speculate(profile_for(LayerSkipModel(inner)))
    peft_model = peft.get_peft_model(inner, config()).eval()
    for refused in (
        lambda: LayerSkipModel(peft_model),
        lambda: peft_model.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=4, custom_generate=decode),
    ):
        with pytest.raises(UnsupportedModelError) as error:
            refused()
        assert str(error.value) == (
            f"adapter: {kind} does more than to replace modules, so it is not supported; use LoRA or another kind that "
            "does only that"
        )


def test_a_peft_model_generates_with_its_lora():
    peft_model = adapted(config=lora(task_type="CAUSAL_LM"))
    decode = speculate(profile_for(LayerSkipModel(peft_model)))
    prompt = torch.tensor([PROMPT])
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    for _ in range(2):  # PEFT leaves a method behind in the model inside it
        found = peft_model.generate(input_ids=prompt, **settings, custom_generate=decode)
        expected = peft_model.generate(input_ids=prompt, **settings)
        near_tie_or_same(peft_model, PROMPT, found[0].tolist(), expected[0].tolist())
