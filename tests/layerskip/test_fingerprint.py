"""Two models are the same model when they compute the same: one fingerprint of configuration and weights."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig

from layerskip import LayerSkipModel
from layerskip.families import FAMILIES
from layerskip.fingerprint import fingerprint, identify
from layerskip.model_state import COMPUTING_SETTINGS, SETTINGS_OF_SOME
from tests.models import EVERY_FAMILY, LAYERS, VOCABULARY, tiny_gemma2, tiny_llama, tiny_model


def fingerprint_of(hf_model):
    return fingerprint(LayerSkipModel(hf_model))


def test_an_identity_says_family_and_sizes(gemma2):
    identity = identify(gemma2, "my-model")
    assert (identity.id, identity.family, identity.num_layers) == ("my-model", "gemma2", LAYERS)
    assert (identity.hidden_size, identity.intermediate_size, identity.vocab_size) == (32, 48, VOCABULARY)
    assert (identity.num_attention_heads, identity.num_key_value_heads) == (4, 2)
    assert re.fullmatch("[0-9a-f]{16}", identity.fingerprint)


def test_a_model_is_called_what_it_was_loaded_by(tmp_path, llama):
    llama.hf_model.save_pretrained(tmp_path)
    loaded = LayerSkipModel(type(llama.hf_model).from_pretrained(tmp_path).eval())
    assert identify(loaded).id == str(tmp_path)
    assert identify(LayerSkipModel(tiny_llama())).id == "unnamed"


def test_weights_loaded_twice_have_one_fingerprint(tmp_path, each_family):
    each_family.hf_model.save_pretrained(tmp_path)
    first, second = (type(each_family.hf_model).from_pretrained(tmp_path).eval() for _ in range(2))
    assert fingerprint_of(first) == fingerprint_of(second) == fingerprint(each_family)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_bfloat16_checkpoint_has_one_fingerprint_in_float32_and_in_bfloat16(family):
    rounded = EVERY_FAMILY[family]().to(torch.bfloat16)
    in_bfloat16 = fingerprint_of(rounded)
    assert fingerprint_of(rounded.to(torch.float32)) == in_bfloat16
    assert fingerprint_of(EVERY_FAMILY[family](seed=1).to(torch.bfloat16)) != in_bfloat16


def test_how_attention_is_computed_does_not_matter():
    assert fingerprint_of(tiny_llama(attention="eager")) == fingerprint_of(tiny_llama(attention="sdpa"))


def test_computing_a_fingerprint_changes_nothing(tiny):
    before = {name: weight.clone() for name, weight in tiny.hf_model.state_dict().items()}
    assert fingerprint(tiny) == fingerprint(tiny)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.hf_model.state_dict().items())


@given(st.data())
@settings(max_examples=60)
def test_any_changed_weight_changes_the_fingerprint(tiny, data):
    _, weight = data.draw(st.sampled_from(list(tiny.hf_model.named_parameters())), label="weight")
    at = data.draw(st.integers(0, weight.numel() - 1))
    before, flat = fingerprint(tiny), weight.data.view(-1)
    old = float(flat[at])
    # The smallest change is a step of bfloat16: weights are hashed as bfloat16.
    new = data.draw(st.sampled_from([0.0, -old, old * (1 + 2**-6), old + 1]).filter(lambda value: value != old))
    try:
        flat[at] = new
        assert fingerprint(tiny) != before
    finally:
        flat[at] = old
    assert fingerprint(tiny) == before


@given(st.data())
@settings(max_examples=40)
def test_two_exchanged_weights_change_the_fingerprint(tiny, data):
    _, weight = data.draw(st.sampled_from(list(tiny.hf_model.named_parameters())), label="weight")
    places = st.integers(0, weight.numel() - 1)
    one, other = data.draw(st.lists(places, min_size=2, max_size=2, unique=True))
    before, flat = fingerprint(tiny), weight.data.view(-1)
    values = flat[[one, other]].clone()
    if values[0].bfloat16() == values[1].bfloat16():
        return
    try:
        flat[[one, other]] = values.flip(0)
        assert fingerprint(tiny) != before
    finally:
        flat[[one, other]] = values


@pytest.mark.parametrize(
    "setting",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"max_position_embeddings": 128},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_a_changed_llama_setting_changes_the_fingerprint(llama, setting):
    assert fingerprint_of(tiny_llama(**setting)) != fingerprint(llama)


@pytest.mark.parametrize(
    "setting",
    [
        {"sliding_window": 6},
        {"layer_types": ["full_attention"] * LAYERS},
        {"query_pre_attn_scalar": 4},
        {"attn_logit_softcapping": 9.0},
        {"final_logit_softcapping": None},
        {"hidden_activation": "silu"},
    ],
    ids=str,
)
def test_a_changed_gemma2_setting_changes_the_fingerprint(gemma2, setting):
    assert fingerprint_of(tiny_gemma2(**setting)) != fingerprint(gemma2)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("granite", {"attention_multiplier": 0.3}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
        ("mistral", {"sliding_window": 6}),
        ("olmo3", {"layer_types": ["full_attention"] * LAYERS}),
    ],
    ids=str,
)
def test_a_changed_setting_of_another_family_changes_the_fingerprint(family, setting):
    assert fingerprint_of(tiny_model(family, **setting)) != fingerprint_of(tiny_model(family))


def test_fingerprints_in_profiles_stay_what_they_were(llama, gemma2):
    """Profiles were written with them; a change here makes all of them profiles of other models."""
    assert (fingerprint(llama), fingerprint(gemma2)) == ("644eb99ca2a39d63", "109c590f1fc8c226")


@pytest.mark.parametrize("setting", [{"eos_token_id": 3}, {"initializer_range": 0.5}, {"use_cache": False}], ids=str)
def test_a_setting_that_computes_nothing_does_not_change_it(llama, setting):
    assert fingerprint_of(tiny_llama(**setting)) == fingerprint(llama)


def test_identities_differ_by_named_fields_and_not_by_what_the_model_is_called(llama, gemma2):
    here = identify(llama, "here")
    assert here.differences(identify(llama, "there")) == {}
    differences = here.differences(identify(gemma2, "there"))
    assert differences["family"] == ("llama", "gemma2")
    assert set(differences) == {"family", "fingerprint"}


@pytest.mark.gpu
def test_a_fingerprint_is_the_same_on_cuda(llama):
    assert fingerprint_of(tiny_llama().to("cuda")) == fingerprint(llama)


# Settings that compute nothing by themselves, or with which a model is refused.
_COMPUTE_NOTHING = {
    "_sliding_window_pattern",  # becomes layer_types
    "attention_dropout",  # evaluation mode drops nothing
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "max_window_layers",  # becomes layer_types
    "no_rope_layer_interval",  # becomes no_rope_layers
    "original_max_position_embeddings",  # of rope types that are refused
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "use_bidirectional_attention",  # refused
    "use_cache",
    "use_sliding_window",  # becomes sliding_window and layer_types
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_a_family_is_fingerprinted_or_computes_nothing(family):
    own = AutoConfig.for_model(family).to_dict().keys() - PreTrainedConfig().to_dict().keys()
    assert own - {*COMPUTING_SETTINGS, *SETTINGS_OF_SOME} <= _COMPUTE_NOTHING
