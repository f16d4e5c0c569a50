"""The table of families: its twists show, what it does not hold is refused, and the page on families tells of it."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    SiglipVisionConfig,
)

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate, load_checkpoint
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.errors import UnsupportedModelError
from layerskip.families import FAMILIES
from tests.models import (
    LAYERS,
    LOCAL_AND_GLOBAL,
    OWN_SETTINGS,
    VOCABULARY,
    WINDOW,
    near_tie_or_same,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    transformers_greedy,
)

TEXT = torch.randint(VOCABULARY, (4 * WINDOW,), generator=torch.Generator().manual_seed(1)).tolist()
PAGE = Path(__file__).parents[2] / "docs" / "families.md"

# Another value for everything in which a family is not Llama.
OTHER_VALUES = {
    "sliding_window": 2 * WINDOW,
    "use_sliding_window": False,
    "max_window_layers": 3,
    "layer_types": LOCAL_AND_GLOBAL[::-1],
    "no_rope_layers": [1, 1, 1, 0],
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_parameters": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attention_multiplier": 0.3,
}
FELT = [(family, name) for family, own in OWN_SETTINGS.items() for name in own if name != "resid_pdrop"]


@torch.inference_mode()
def logits_of(hf_model):
    return hf_model(torch.tensor([TEXT])).logits[0]


@torch.inference_mode()
def our_logits_of(hf_model):
    model = LayerSkipModel(hf_model)
    return model.logits(model.forward(torch.tensor(TEXT), model.new_cache(0)))


@pytest.mark.parametrize(("family", "name"), FELT, ids=lambda part: part)
def test_a_tiny_model_feels_every_setting_of_its_family_and_so_does_the_stack(family, name):
    other = tiny_model(family, **{name: OTHER_VALUES[name]})
    assert (logits_of(other) - logits_of(tiny_model(family))).abs().max() > 0.1
    torch.testing.assert_close(our_logits_of(other), logits_of(other), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_are_welcome(family):
    model = tiny_model(family, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(our_logits_of(model), logits_of(model), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_logits_stay_close_to_those_of_transformers(family):
    """Between the modules, the hidden states have the type that transformers gives them."""
    model = tiny_model(family).to(torch.bfloat16)
    torch.testing.assert_close(our_logits_of(model), logits_of(model).float(), atol=1e-2, rtol=1e-2)


# What the table does not hold.


def refusal_of(hf_model):
    with pytest.raises(UnsupportedModelError) as error:
        LayerSkipModel(hf_model.eval())
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_that_scores_no_tokens_is_refused(kind):
    headless = kind.from_config(tiny_model("llama").config)
    assert refusal_of(headless) == (
        f"{type(headless).__name__}: has no output head to score tokens with; load the model with AutoModelForCausalLM"
    )


def test_another_family_is_refused_with_a_list_of_those_supported():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=16, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    assert refusal_of(gpt2) == (
        "model type 'gpt2' is not supported; supported: gemma, gemma2, gemma3_text, granite, llama, mistral, olmo2, "
        "olmo3, phi3, qwen2, qwen3, smollm3"
    )


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_a_model_that_sees_the_future_is_refused(family):
    assert "only causal models" in refusal_of(tiny_model(family, use_bidirectional_attention=True))


def test_a_rope_that_changes_with_the_length_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert refusal_of(tiny_llama(rope_parameters=rope)).startswith("rope type 'dynamic' changes its frequencies")


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_a_rope_that_changes_with_the_length_in_some_layers_is_refused(family):
    fixed = {"rope_type": "default", "rope_theta": 10.0}
    changing = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    model = tiny_model(family, rope_parameters={"sliding_attention": fixed, "full_attention": changing})
    assert refusal_of(model).startswith("rope type 'dynamic' changes its frequencies")


def test_a_phi_3_for_long_contexts_is_refused():
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    assert refusal_of(model).startswith("rope type 'longrope' changes its frequencies")


# Multimodal Gemma-3.


@pytest.fixture(scope="module")
def multimodal():
    """A random Gemma-3 with eyes."""
    text = tiny_model("gemma3_text")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    images = {"image_token_index": 63, "boi_token_index": 62, "eoi_token_index": 61}
    config = Gemma3Config(text_config=text.config, vision_config=vision, tie_word_embeddings=False, **images)
    model = Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model.eval()


def test_a_multimodal_gemma_3_is_refused_with_what_to_do(multimodal):
    assert refusal_of(multimodal) == (
        "model type 'gemma3' is multimodal and not supported, but its text model ('gemma3_text') is; save that as a "
        "model of its own, as docs/families.md shows"
    )


def test_the_text_model_of_a_multimodal_gemma_3_decodes_as_the_page_on_families_shows(multimodal, tmp_path):
    folder = tmp_path / "text"
    code = PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    saving = code[code.index("text = ") :]
    exec(saving, {"Gemma3ForCausalLM": Gemma3ForCausalLM, "whole": multimodal, "folder": folder})
    tiny_tokenizer().save_pretrained(folder)
    hf_model = load_checkpoint(str(folder), device="cpu").model
    expected = transformers_greedy(multimodal, [1, 2, 3], 24)
    model = LayerSkipModel(hf_model)
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (2,), (1,)), stopping=FixedLength(3)))
    ours = generate(model, [1, 2, 3], drafter=drafter, max_new_tokens=24, eos_token_ids=())
    near_tie_or_same(hf_model, [1, 2, 3], ours.tokens, expected)
    assert len(set(expected)) > 3


# The page.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_on_families_has_a_row_for_every_family(family):
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert sum(f"`{family}`" in row.split("|")[1] for row in rows) == 1
