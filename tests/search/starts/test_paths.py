"""Skip sets by dynamic programming."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from layerskip import SkipSet
from search.starting_skip_sets import best_paths, most_similar_paths, quantized
from tests.search.starts.conftest import IDLE, LAYERS

SUBLAYERS = 2 * LAYERS


def similarity_of(case, skipped):
    """What the whole draft's last hidden states have in common with the target model's, computed the long way."""
    with torch.inference_mode():
        tokens = torch.tensor(case.text)
        x = case.model.forward(tokens, case.model.new_cache(len(tokens)), SkipSet.of_sublayers(skipped, LAYERS))[0]
    return float(functional.cosine_similarity(x, case.states[-1], dim=-1).mean())


def test_a_paths_similarity_is_that_of_the_draft_it_stands_for(busy):
    for path in best_paths(busy.states, busy.run_sublayer, [1] * SUBLAYERS, most=SUBLAYERS - 1):
        assert len(path.skipped) == path.units
        assert path.similarity == pytest.approx(similarity_of(busy, path.skipped), abs=1e-5)


def test_a_path_costs_what_it_skips(busy):
    units = [1, 3] * LAYERS
    paths = best_paths(busy.states, busy.run_sublayer, units, most=13)
    assert [path.units for path in paths] == list(range(14))
    assert all(path.units == sum(units[index] for index in path.skipped) for path in paths)


def test_what_does_nothing_is_skipped_before_anything_else(partly_idle):
    paths = best_paths(partly_idle.states, partly_idle.run_sublayer, [1] * SUBLAYERS, most=len(IDLE))
    assert paths[-1].skipped == IDLE
    assert paths[-1].similarity == pytest.approx(1, abs=1e-5)


def test_the_table_finds_nearly_the_best_of_all_drafts_of_a_size(busy):
    """It is a heuristic, for the best way to a boundary need not be a part of the best way to the top."""
    for count in (2, 3):
        path = best_paths(busy.states, busy.run_sublayer, [1] * SUBLAYERS, most=count)[-1]
        of_all = sorted(similarity_of(busy, skipped) for skipped in itertools.combinations(range(SUBLAYERS), count))
        better = sum(similarity > path.similarity + 1e-5 for similarity in of_all)
        assert better <= len(of_all) / 10


def test_each_start_saves_its_budget_and_hardly_more(busy):
    units = [1, 3] * LAYERS
    for source, skip_set in most_similar_paths(busy.states, busy.run_sublayer, [0.01, 0.03] * LAYERS):
        budget = float(source.split()[2].rstrip("%")) / 100 * sum(units)
        saved = sum(unit for unit, skip in zip(units, skip_set.mask, strict=True) if skip)
        assert budget - 0.02 <= saved < budget + max(units)


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=60))
def test_quantized_costs_are_positive_and_keep_their_order(costs):
    units = quantized(costs)
    assert min(units) >= 1
    for (cost, unit), (other, other_unit) in itertools.combinations(zip(costs, units, strict=True), 2):
        assert cost == other or (cost < other) <= (unit <= other_unit)


def test_a_stack_of_one_layer_keeps_something():
    states = torch.randn(3, 4, 8)
    starts = list(most_similar_paths(states, lambda index, x: x + 1, [1.0, 1.0]))
    assert all(len(skip_set) == 1 for _, skip_set in starts)
