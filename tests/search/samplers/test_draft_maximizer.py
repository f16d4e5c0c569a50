"""The candidate of highest predicted speedup."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import SkipSet
from layerskip.drafting.config import DraftConfig
from search.samplers.draft_maximizer import DraftMaximizer
from search.samplers.neighbours import nearby
from studies.acceptance_model import Damage, acceptance_of
from tests.search.samplers.problems import ALL_SPACES, LinearCosts, space_of

SUBLAYERS = 6


@st.composite
def damages(draw, space):
    """Damages of everything that a space has."""
    trained = draw(st.floats(0, 1))
    return Damage(
        np.array(draw(st.lists(st.floats(0, 0.5), min_size=SUBLAYERS, max_size=SUBLAYERS))),
        -draw(st.floats(0, 0.1)),
        draw(st.floats(0, 0.1)),
        {8: draw(st.floats(0, 0.3)), 16: 0.1},
        {},
        {layer: trained / number for number, layer in enumerate(space.draft_layers, start=1)},
    )


all_costs = st.builds(LinearCosts, st.lists(st.floats(0.01, 0.3), min_size=SUBLAYERS, max_size=SUBLAYERS))


def speedup_of(config, costs, damage):
    below = np.array(config.skipped_below.mask)
    total = below @ damage.of_sublayers(config.bridges) + damage.of_options(config)
    step_cost = costs.draft_steps(config, np.array([config.skip_set.mask]))
    return costs.best_speedups(acceptance_of(np.array([total])), step_cost)[0]


def every_candidate(space):
    for mask in itertools.product((False, True), repeat=2 * space.num_layers):
        for options in space.options:
            if not all(mask[: options.exit_at]):
                yield replace(options, skip_set=SkipSet.from_mask(mask))


@pytest.mark.parametrize("space", ALL_SPACES)
@given(costs=all_costs, data=st.data())
@settings(max_examples=40)
def test_it_is_as_fast_as_predicted_and_no_single_sublayer_can_improve_it(space, costs, data):
    damage = data.draw(damages(space))
    proposal = DraftMaximizer(space, costs).best(damage)
    config = proposal.config
    assert proposal.speedup == pytest.approx(speedup_of(config, costs, damage))
    assert tuple(proposal.mask) == config.skip_set.mask
    for index in range(config.exit_at):
        for other in nearby(config, [index]):
            assert speedup_of(other, costs, damage) <= proposal.speedup * (1 + 1e-9)


@pytest.mark.parametrize("space", ALL_SPACES)
def test_it_is_the_best_of_all_candidates_or_next_to_it(space):
    rng = random.Random(0)
    for _ in range(10):
        costs = LinearCosts([rng.uniform(0.05, 0.2) for _ in range(SUBLAYERS)])
        sublayers = np.array([rng.expovariate(5) for _ in range(SUBLAYERS)])
        layers = dict(zip(space.draft_layers, (0.3, 0.2), strict=False))
        damage = Damage(sublayers, -0.05, 0.02, {8: 0.1, 16: 0.05}, draft_layers=layers)
        best = max(speedup_of(config, costs, damage) for config in every_candidate(space))
        assert DraftMaximizer(space, costs).best(damage).speedup >= 0.97 * best


@given(costs=all_costs, damage=damages(ALL_SPACES[0]))
def test_sublayers_are_ordered_by_how_little_their_bit_matters(costs, damage):
    maximizer = DraftMaximizer(ALL_SPACES[0], costs)
    best = maximizer.best(damage).config
    assert sorted(maximizer.nearest_to_break_even(damage, best)) == list(range(SUBLAYERS))


def test_the_last_that_pays_matters_less_than_what_is_free_or_fatal():
    damage = Damage(np.array([0.0, 0.04, 0.06, 9.0]), 0.0, 0.0, {})
    maximizer = DraftMaximizer(space_of(2), LinearCosts([0.2] * 4))
    order = maximizer.nearest_to_break_even(damage, DraftConfig(SkipSet(2, (0,), (0,))))
    assert set(order[:2]) == {1, 2}
    assert order[-1] == 3


def test_what_a_measurement_says_to_cost_nothing_is_no_division_by_zero():
    damage = Damage(np.array([0.1, 0.1]), 0.0, 0.0, {})
    best = DraftMaximizer(space_of(1), LinearCosts([0.0, 0.8])).best(damage)
    assert np.isfinite(best.speedup)


@given(st.lists(st.booleans(), min_size=6, max_size=6).filter(lambda mask: not all(mask)), st.permutations(range(6)))
def test_nearby_candidates_are_all_there_are_and_ever_farther(mask, order):
    found = [config.skip_set.mask for config in nearby(DraftConfig(SkipSet.from_mask(mask)), order)]
    assert len(set(found)) == len(found) == 2**6 - 1
    distances = [sum(a != b for a, b in zip(other, mask, strict=True)) for other in found]
    assert distances == sorted(distances)
    first = next(other for other in found if other != tuple(mask))
    if not all(skip or index == order[0] for index, skip in enumerate(mask)):
        assert first[order[0]] != mask[order[0]]


def test_a_draft_layer_is_taken_where_it_pays_and_nowhere_else():
    space = space_of(3, exits=(2,))
    maximizer = DraftMaximizer(space, LinearCosts([0.13] * 6))
    [layer] = space.draft_layers

    def with_damage(trained):
        return maximizer.best(Damage(np.full(6, 0.5), 0.0, 0.0, {}, draft_layers={layer: trained})).config

    assert with_damage(0.1).draft_layer == layer
    assert with_damage(5.0).draft_layer is None


def test_what_a_draft_layer_replaces_is_no_bit_to_flip():
    space = space_of(3, exits=(2,))
    [layer] = space.draft_layers
    maximizer = DraftMaximizer(space, LinearCosts([0.13] * 6))
    config = DraftConfig(SkipSet(3), draft_layer=layer)
    order = maximizer.nearest_to_break_even(Damage(np.full(6, 0.5), 0.0, 0.0, {}, draft_layers={layer: 0.1}), config)
    assert sorted(order) == [0, 1]
