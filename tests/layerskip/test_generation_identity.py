"""The promise: greedy output is that of ``model.generate(do_sample=False)``, whatever the draft."""

import copy

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from layerskip import (
    AdaptiveThreshold,
    ConfidenceThreshold,
    DraftConfig,
    FixedLength,
    LayerSkipModel,
    SkipSet,
    generate,
)
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.names import PRECISIONS
from tests.models import EVERY_FAMILY, LAYERS, VOCABULARY, near_tie_or_same, transformers_greedy
from tests.strategies import draft_exits, precisions, skip_sets, tokens

NOTHING = SkipSet(LAYERS)
end_tokens = st.sets(st.integers(0, VOCABULARY - 1), max_size=3)


@given(tokens(20), skip_sets() | st.just(NOTHING), precisions(), draft_exits(), st.integers(1, 24), end_tokens)
@settings(max_examples=25)
def test_greedy_output_is_that_of_transformers(each_family, prompt, skip_set, precision, exit_at, max_new_tokens, eos):
    ours = generate(
        each_family,
        prompt,
        drafter=LayerSkipDrafter(each_family, DraftConfig(skip_set, precision=precision, stopping=exit_at)),
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos,
    )
    expected = transformers_greedy(each_family.hf_model, prompt, max_new_tokens, eos)
    parted = near_tie_or_same(each_family.hf_model, prompt, ours.tokens, expected)
    event(f"near tie: {parted}")
    event(f"finished by {ours.finish_reason}")
    event(f"some accepted: {ours.stats.accepted > 0}")


@given(tokens(20), st.integers(1, 24), end_tokens)
@settings(max_examples=8)
def test_plain_decoding_is_that_of_transformers(each_family, prompt, max_new_tokens, eos):
    ours = generate(each_family, prompt, max_new_tokens=max_new_tokens, eos_token_ids=eos)
    expected = transformers_greedy(each_family.hf_model, prompt, max_new_tokens, eos)
    near_tie_or_same(each_family.hf_model, prompt, ours.tokens, expected)


def test_drafts_are_in_part_accepted_and_in_part_rejected(each_family):
    """Without this, the identity above could hold because nothing is ever accepted, or nothing ever rejected."""
    drafter = LayerSkipDrafter(each_family, DraftConfig(SkipSet(LAYERS, (2,), (1,)), stopping=FixedLength(3)))
    stats = [generate(each_family, [first, 3], drafter=drafter, max_new_tokens=24).stats for first in range(4)]
    accepted, drafted = sum(s.accepted for s in stats), sum(s.drafted for s in stats)
    assert 0.05 < accepted / drafted < 0.95


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_drafts_at_lower_precision_are_accepted_in_part_too(each_family, precision):
    drafter = LayerSkipDrafter(each_family, DraftConfig(NOTHING, precision=precision, stopping=FixedLength(3)))
    stats = [generate(each_family, [first, 3], drafter=drafter, max_new_tokens=24).stats for first in range(4)]
    accepted, drafted = sum(s.accepted for s in stats), sum(s.drafted for s in stats)
    assert accepted / drafted > (0.5 if precision == "int8" else 0.1)
    assert precision == "int8" or accepted < drafted


@pytest.mark.parametrize("precision", PRECISIONS)
def test_decoding_leaves_the_model_as_it_was(tiny, precision):
    hf_model = tiny.hf_model
    weights, config = copy.deepcopy(hf_model.state_dict()), copy.deepcopy(hf_model.config.to_dict())
    generation_config = copy.deepcopy(hf_model.generation_config.to_dict())
    before = transformers_greedy(hf_model, [1, 2, 3], 16)
    generate(
        tiny,
        [4, 5],
        drafter=LayerSkipDrafter(tiny, DraftConfig(SkipSet(LAYERS, (0,), (3,)), precision=precision)),
        max_new_tokens=16,
    )
    assert hf_model.config.to_dict() == config
    assert hf_model.generation_config.to_dict() == generation_config
    assert all(torch.equal(weight, weights[name]) for name, weight in hf_model.state_dict().items())
    assert not hf_model.training
    assert transformers_greedy(hf_model, [1, 2, 3], 16) == before


def test_one_drafter_serves_generation_after_generation(tiny):
    drafter = LayerSkipDrafter(tiny, DraftConfig(SkipSet(LAYERS, (2,)), stopping=AdaptiveThreshold(0.3, max_length=5)))
    first, other, again = (
        generate(tiny, prompt, drafter=drafter, max_new_tokens=20) for prompt in ([1, 2], [9] * 7, [1, 2])
    )
    assert first.tokens == again.tokens
    assert (first.stats.rounds, first.stats.drafted) == (again.stats.rounds, again.stats.drafted)
    assert other.tokens != first.tokens


DRAFT_EXITS = [FixedLength(4), ConfidenceThreshold(0.5), AdaptiveThreshold(), FixedLength(7)]


@pytest.mark.gpu
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_on_cuda_greedy_output_is_that_of_transformers(family):
    model = LayerSkipModel(EVERY_FAMILY[family]().to("cuda"))
    for first, draft_exit in enumerate(DRAFT_EXITS):
        prompt = [first, 3, 5, 7, 11, 13, 17]
        for precision in model.copies.precisions:
            config = DraftConfig(SkipSet(LAYERS, (0, 2), (1,)), precision=precision, stopping=draft_exit)
            ours = generate(model, prompt, drafter=LayerSkipDrafter(model, config), max_new_tokens=32).tokens
            near_tie_or_same(model.hf_model, prompt, ours, transformers_greedy(model.hf_model, prompt, 32))
