"""Decoding methods: all generate the same, and their work is counted alike."""

import pytest
from transformers import GenerationConfig

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import EagerEngine
from search.decoding_methods import layerskip_method, transformers_method
from tests.layerskip.test_transformers_integration import profile_for
from tests.models import LAYERS, tiny_llama, transformers_greedy

PROMPT = (3, 1, 4, 1, 5)
LENGTH = 12


@pytest.fixture
def model():
    return LayerSkipModel(tiny_llama())


@pytest.fixture
def expected(model):
    return tuple(transformers_greedy(model.hf_model, list(PROMPT), LENGTH))


def everything_kept(model):
    """An assistant that is the model itself."""
    return profile_for(model.hf_model, SkipSet(LAYERS)).as_assistant(model.hf_model)


METHODS = {
    "own": lambda name, model: layerskip_method(name, EagerEngine(model), None),
    "own, drafting": lambda name, model: layerskip_method(
        name, EagerEngine(model), LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (2,)), stopping=FixedLength(3)))
    ),
    "plain": transformers_method,
    "prompt lookup": lambda name, model: transformers_method(name, model, prompt_lookup_num_tokens=4),
    "early exit": lambda name, model: transformers_method(name, model, assistant_early_exit=2),
    "assistant": lambda name, model: transformers_method(name, model, assistant_model=everything_kept(model)),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_generates_what_plain_greedy_decoding_generates(model, expected, method):
    decoded = METHODS[method](method, model).decode(PROMPT, LENGTH)
    assert decoded.tokens == expected
    assert 1 <= decoded.target_passes <= LENGTH
    assert 0 <= decoded.accepted <= decoded.drafted


@pytest.mark.parametrize("method", ["own", "plain"])
def test_plain_decoding_takes_a_pass_for_each_token_and_drafts_nothing(model, method):
    decoded = METHODS[method](method, model).decode(PROMPT, LENGTH)
    assert (decoded.target_passes, decoded.drafted, decoded.accepted) == (LENGTH, 0, 0)


@pytest.mark.parametrize("method", ["early exit", "assistant"])
def test_passes_that_draft_are_not_counted_as_the_target_models(model, method):
    whole, made = [], METHODS[method](method, model)
    model.hf_model.model.layers[LAYERS - 1].register_forward_pre_hook(lambda *_: whole.append(1))
    decoded = made.decode(PROMPT, LENGTH)
    assert decoded.drafted > 0
    assert decoded.target_passes == LENGTH - decoded.accepted
    if method == "early exit":  # the only passes that reach the last layer are the target model's
        assert decoded.target_passes == len(whole)


def test_an_assistant_that_is_the_model_itself_is_never_wrong(model):
    decoded = METHODS["assistant"]("assistant", model).decode(PROMPT, LENGTH)
    assert decoded.accepted == decoded.drafted
    assert decoded.target_passes < LENGTH / 2


def test_what_a_checkpoint_recommends_for_generating_is_no_part_of_the_comparison(model, expected):
    recommended = GenerationConfig(do_sample=True, repetition_penalty=5.0, no_repeat_ngram_size=1)
    model.hf_model.generation_config = recommended
    assert transformers_method("theirs", model).decode(PROMPT, LENGTH).tokens == expected
    assert model.hf_model.generation_config is recommended


def test_both_end_where_the_checkpoints_end_token_comes(model, expected):
    model.hf_model.generation_config.eos_token_id = expected[4]
    end = expected.index(expected[4]) + 1
    assert layerskip_method("own", EagerEngine(model), None).decode(PROMPT, LENGTH).tokens == expected[:end]
    assert transformers_method("theirs", model).decode(PROMPT, LENGTH).tokens == expected[:end]


def test_a_model_is_left_as_it_was_even_where_transformers_fails(model):
    def fail(*_):
        raise RuntimeError("out of luck")

    before = model.hf_model.generation_config
    model.hf_model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        transformers_method("theirs", model, assistant_early_exit=2).decode(PROMPT, LENGTH)
    assert model.hf_model.generation_config is before
    assert model.config.num_hidden_layers == LAYERS
    assert "_get_candidate_generator" not in vars(model.hf_model)
    assert not model.hf_model._forward_pre_hooks
