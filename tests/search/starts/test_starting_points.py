"""Where a search starts."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.space import SearchSpace
from search.starts import starting_points

LAYERS = st.integers(1, 130)
SPACES = st.builds(SearchSpace, LAYERS, st.integers(1, 12))


def skip_sets(space):
    return [candidate.skip_set for _, candidate in starting_points(space)]


@given(SPACES)
def test_starting_points_are_candidates_of_the_space(space):
    for _, candidate in starting_points(space):
        assert candidate.skip_set.num_layers == space.num_layers
        assert candidate.draft_exit.max_length <= space.max_draft_length
        assert space.lowest_threshold <= candidate.draft_exit.threshold <= space.highest_threshold
        assert space.candidate(space.parameters(candidate)) == candidate


@given(SPACES)
def test_starting_points_skip_something_and_no_two_skip_the_same(space):
    chosen = skip_sets(space)
    assert all(len(skip_set) for skip_set in chosen)
    assert len(set(chosen)) == len(chosen)


@given(SPACES)
def test_starting_points_have_names_of_their_own(space):
    names = [name for name, _ in starting_points(space)]
    assert len(set(names)) == len(names)


@given(LAYERS)
def test_starting_points_keep_the_first_and_the_last_layer(num_layers):
    for skip_set in skip_sets(SearchSpace(num_layers)):
        assert not {0, num_layers - 1} & {*skip_set.attention, *skip_set.mlp}


@given(LAYERS)
def test_starting_points_skip_at_most_half_of_a_kind_and_layers_evenly_apart(num_layers):
    for skip_set in skip_sets(SearchSpace(num_layers)):
        for layers in (skip_set.attention, skip_set.mlp):
            gaps = {after - before for before, after in pairwise(layers)}
            assert len(layers) <= (num_layers - 1) / 2
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("num_layers", [8, 16, 30, 32, 80])
def test_a_model_of_usual_depth_gets_five_starting_points(num_layers):
    assert len(skip_sets(SearchSpace(num_layers))) == 5


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_model_without_inner_layers_has_no_starting_point(num_layers):
    assert skip_sets(SearchSpace(num_layers)) == []
