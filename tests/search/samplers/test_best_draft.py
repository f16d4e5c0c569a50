"""The draft of highest predicted speedup."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.samplers import Draft, DraftChoices, SpeedupFormula
from search.samplers.best_draft import DraftMaximizer, nearby, with_flips
from search.samplers.damage import Damage, acceptance_of
from tests.search.samplers.problems import ALL_KINDS, LinearCosts, bits

SUBLAYERS = 6
damages = st.builds(
    lambda sublayers, mended, bridged, vocabulary, trained: Damage(
        np.array(sublayers), -mended, bridged, {8: vocabulary, 16: vocabulary / 2}, {1: trained, 2: trained / 2}
    ),
    st.lists(st.floats(0, 0.5), min_size=SUBLAYERS, max_size=SUBLAYERS),
    st.floats(0, 0.1),
    st.floats(0, 0.1),
    st.floats(0, 0.3),
    st.floats(0, 1),
)
all_costs = st.builds(LinearCosts, st.lists(st.floats(0.01, 0.3), min_size=SUBLAYERS, max_size=SUBLAYERS))


def speedup_of(choices, draft, costs, damage):
    free = choices.free(draft.stand_in)
    extras = (draft.bridged, draft.vocabulary, draft.stand_in)
    total = np.array(draft.mask[:free]) @ damage.of_sublayers(draft.bridged)[:free] + damage.of_extras(*extras)
    step_cost = costs.draft_step_cost(draft.mask, *extras)
    return SpeedupFormula.of(costs, 8)(acceptance_of(np.array([total])), np.array([step_cost]))[0]


def every_draft(choices):
    for mask in itertools.product((False, True), repeat=len(choices.bits)):
        if not all(mask):
            for extras in choices.extras:
                yield choices.effective(Draft(mask, *extras))


@pytest.mark.parametrize("choices", ALL_KINDS)
@given(costs=all_costs, damage=damages)
@settings(max_examples=40)
def test_it_is_as_fast_as_predicted_and_no_single_sublayer_can_mend_it(choices, costs, damage):
    proposal = DraftMaximizer(choices, costs, 8).best(damage)
    assert not all(proposal.draft.mask)
    assert proposal.speedup == pytest.approx(speedup_of(choices, proposal.draft, costs, damage))
    assert choices.effective(proposal.draft) == proposal.draft
    for index in range(choices.free(proposal.draft.stand_in)):
        flipped = with_flips(proposal.draft, [index])
        if not all(flipped.mask):
            assert speedup_of(choices, flipped, costs, damage) <= proposal.speedup * (1 + 1e-9)


@pytest.mark.parametrize("choices", ALL_KINDS)
def test_it_is_the_best_of_all_drafts_or_next_to_it(choices):
    rng = random.Random(0)
    for _ in range(10):
        costs = LinearCosts([rng.uniform(0.05, 0.2) for _ in range(SUBLAYERS)])
        sublayers = np.array([rng.expovariate(5) for _ in range(SUBLAYERS)])
        damage = Damage(sublayers, -0.05, 0.02, {8: 0.1, 16: 0.05}, {1: 0.3, 2: 0.2})
        drafts = [draft for draft in every_draft(choices) if not all(draft.mask)]
        best = max(speedup_of(choices, draft, costs, damage) for draft in drafts)
        assert DraftMaximizer(choices, costs, 8).best(damage).speedup >= 0.97 * best


@given(all_costs, damages)
def test_sublayers_are_ordered_by_how_little_their_bit_matters(costs, damage):
    maximizer = DraftMaximizer(ALL_KINDS[0], costs, 8)
    best = maximizer.best(damage).draft
    assert sorted(maximizer.by_indifference(damage, best)) == list(range(SUBLAYERS))


def test_the_last_that_pays_matters_less_than_what_is_free_or_fatal():
    damage = Damage(np.array([0.0, 0.04, 0.06, 9.0]), 0.0, 0.0, {})
    maximizer = DraftMaximizer(DraftChoices(bits(4)), LinearCosts([0.2] * 4), 8)
    order = maximizer.by_indifference(damage, Draft((True, True, False, False)))
    assert set(order[:2]) == {1, 2}
    assert order[-1] == 3


def test_what_a_measurement_says_to_cost_nothing_is_no_division_by_zero():
    damage = Damage(np.array([0.1, 0.1]), 0.0, 0.0, {})
    best = DraftMaximizer(DraftChoices(bits(2)), LinearCosts([0.0, 0.8]), 8).best(damage)
    assert np.isfinite(best.speedup)


@given(st.lists(st.booleans(), min_size=5, max_size=5).filter(lambda mask: not all(mask)), st.permutations(range(5)))
def test_nearby_drafts_are_all_there_are_and_ever_farther(mask, order):
    drafts = list(nearby(Draft(tuple(mask)), order))
    assert len({draft.mask for draft in drafts}) == len(drafts) == 2**5 - 1
    distances = [sum(a != b for a, b in zip(draft.mask, mask, strict=True)) for draft in drafts]
    assert distances == sorted(distances)
    first = next(draft for draft in drafts if draft.mask != tuple(mask))
    if not all(skip or index == order[0] for index, skip in enumerate(mask)):
        assert first.mask[order[0]] != mask[order[0]]


def test_a_trained_stand_in_is_taken_where_it_pays_and_nowhere_else():
    choices = DraftChoices(bits(6), exits=(2,))
    maximizer = DraftMaximizer(choices, LinearCosts([0.13] * 6), 8)

    def with_damage(trained):
        return maximizer.best(Damage(np.full(6, 0.5), 0.0, 0.0, {}, {1: trained})).draft

    assert with_damage(0.1).stand_in == 1
    assert with_damage(5.0).stand_in == 0


def test_what_a_stand_in_stands_for_is_no_bit_to_flip():
    choices = DraftChoices(bits(6), exits=(2,))
    maximizer = DraftMaximizer(choices, LinearCosts([0.13] * 6), 8)
    draft = choices.effective(Draft((False,) * 6, stand_in=1))
    order = maximizer.by_indifference(Damage(np.full(6, 0.5), 0.0, 0.0, {}, {1: 0.1}), draft)
    assert sorted(order) == [0, 1]
