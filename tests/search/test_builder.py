"""What candidates' drafts are made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerskip import FixedLength, SkipSet
from layerskip.costs import DraftParts
from layerskip.drafting.bridges import BridgeFitter
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.drafter import RoundResult
from layerskip.engine import EagerEngine, Scored
from layerskip.sampling import Draft, Verdict
from search.builder import DraftBuilder
from search.prompts import SearchPrompts
from search.reference import record
from search.settings import SearchSettings
from tests.models import LAYERS, VOCABULARY
from tests.search.searches import known_costs, random_prompts

MIDDLE = SkipSet(LAYERS, attention=(1, 2), mlp=(1, 2))


@pytest.fixture
def makers(llama, monkeypatch):
    monkeypatch.setattr(BridgeFitter, "is_cheaper", lambda self, start, stop: True)
    texts = [record(llama, prompt.tokens, [1, 2, 3], states=8) for prompt in random_prompts(search=4).search]
    return DraftBuilder(llama, texts)


def test_a_candidate_gets_what_it_asks_for_and_nothing_else(makers):
    assert not makers.weights(DraftConfig(MIDDLE)).tensors()
    bridged = makers.weights(DraftConfig(MIDDLE, bridges=True))
    assert ([bridge.start for bridge in bridged.bridges], bridged.token_ids) == ([2], None)
    small = makers.weights(DraftConfig(MIDDLE, vocabulary_size=7))
    assert (len(small.bridges), len(small.token_ids)) == (0, 7)


@pytest.mark.parametrize("skip_set", [MIDDLE, SkipSet(LAYERS), SkipSet(LAYERS, attention=(0, 3), mlp=(0,))])
def test_the_number_of_bridges_is_known_before_they_are_made(makers, skip_set):
    config = DraftConfig(skip_set, bridges=True)
    fitted = len(makers.weights(config).bridges)
    assert makers.num_bridges(np.array([skip_set.mask, SkipSet(LAYERS).mask])).tolist() == [fitted, 0]
    assert makers.as_built(config) == replace(config, bridges=fitted > 0)


def test_what_is_estimated_is_what_is_decoded_with(llama, makers):
    config = DraftConfig(
        MIDDLE,
        bridges=True,
        vocabulary_size=VOCABULARY // 2,
        stopping=FixedLength(3),
        target_confidence_threshold=0.5,
    )
    stack, drafter = makers.stack(config), makers.drafter(config)
    assert [index for index, _ in drafter._stack.steps] == [index for index, _ in stack.steps] == [0, 1, 2, 6, 7]
    assert torch.equal(drafter._stack.token_ids, stack.token_ids)
    drafter.start(EagerEngine(llama), torch.tensor([1]), torch.zeros(1, 8))
    nothing, unsure = Draft.of([], torch.device("cpu")), Scored(torch.zeros(1, VOCABULARY), torch.zeros(1, 8))
    drafter.observe(RoundResult(nothing, Verdict([2], torch.tensor([2]), (0,)), torch.tensor([1]), unsure))
    assert drafter._paused  # by the target-confidence threshold


def prompts_of(count, **settings):
    return SearchPrompts.of(random_prompts(search=count, held_out=3), SearchSettings(**settings))


def test_drafts_are_fitted_to_other_prompts_than_they_are_scored_on():
    prompts = prompts_of(8, prompts_per_trial=3, held_out_prompts=2)
    assert (len(prompts.scored), len(prompts.fitted), len(prompts.measured), len(prompts.held_out)) == (4, 4, 3, 2)
    assert not set(prompts.scored) & set(prompts.fitted)
    assert set(prompts.measured) <= set(prompts.scored)
    assert len(prompts_of(8, prompts_per_trial=6).scored) == 6


def test_with_few_prompts_all_do_everything():
    prompts = prompts_of(3, prompts_per_trial=3)
    assert prompts.scored == prompts.fitted == prompts.measured
    assert len(prompts_of(1, prompts_per_trial=6).scored) == 1


@pytest.mark.parametrize("skip_set", [SkipSet(LAYERS), SkipSet(LAYERS, attention=(2,))])
def test_round_costs_are_those_that_simulation_counts_with(llama, makers, skip_set):
    engine, costs, config = EagerEngine(llama), known_costs(), DraftConfig(skip_set, stopping=FixedLength(3))
    rounds, parts = makers.round_costs(engine, config, costs), DraftParts.of(makers.stack(config))
    share = makers.stack(config).shared / (2 * LAYERS)
    for context in (8, 30, 48):
        at = costs.at(context)
        for places in (1, 2, 3):
            drafting = places * at.draft_step(parts)
            whole, resumed = at.verification(places + 1), at.verification(places + 1, share)
            found = rounds.plain_steps(context, places=places, tokens=places + 1)
            assert found == pytest.approx((drafting + whole) / at.plain_step, rel=0.01)
            found = rounds.plain_steps(context, places=places, tokens=places + 1, resuming=True)
            assert found == pytest.approx((drafting + resumed) / at.plain_step, rel=0.01)
    assert rounds.are_of(engine)
