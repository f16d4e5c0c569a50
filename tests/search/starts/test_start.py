"""What all families of starts have in common."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip import SkipSet
from search.starting_skip_sets import (
    counts_of,
    different,
    early_exits,
    evenly_spaced,
    least_change,
    least_damage,
    most_similar_paths,
    nothing_skipped,
    published,
)
from tests.search.starts.conftest import LAYERS
from tests.strategies import skip_sets


def all_families(case):
    costs = [1.0, 3.0] * LAYERS
    return [
        *nothing_skipped(LAYERS),
        *evenly_spaced(LAYERS),
        *early_exits(LAYERS),
        *least_change(case.states),
        *most_similar_paths(case.states, case.run_sublayer, costs),
        *least_damage(lambda skip_set: 1 / (1 + sum(skip_set.attention)), costs),
    ]


@pytest.mark.parametrize("family", [nothing_skipped, evenly_spaced, early_exits, published])
@given(st.integers(1, 130))
def test_what_depends_on_depth_alone_fits_any_depth_and_comes_in_the_same_order(family, num_layers):
    starts = list(family(num_layers))
    assert all(skip_set.num_layers == num_layers for _, skip_set in starts)
    assert starts == list(family(num_layers))
    assert len(dict(starts)) == len({skip_set for _, skip_set in starts}) == len(starts)


def test_what_depends_on_the_model_comes_in_the_same_order(busy):
    assert all_families(busy) == all_families(busy)


def test_every_start_says_where_it_comes_from(busy):
    sources = [source for source, _ in all_families(busy)]
    assert len(set(sources)) == len(sources)
    assert all(sources)


@given(st.lists(st.tuples(st.text(max_size=2), skip_sets(2))))
def test_of_starts_that_skip_the_same_the_first_stays(starts):
    kept = list(different(starts))
    chosen = [skip_set for _, skip_set in kept]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) == {skip_set for _, skip_set in starts}
    for source, skip_set in kept:
        assert source == next(name for name, other in starts if other == skip_set)


@given(st.integers(1, 200), st.lists(st.floats(0, 1)))
def test_counts_are_neither_none_nor_all(total, shares):
    counts = counts_of(total, shares)
    assert len(set(counts)) == len(counts)
    assert all(0 < count < total for count in counts)


def test_the_empty_skip_set_is_a_start():
    assert list(nothing_skipped(3)) == [("nothing skipped", SkipSet(3))]


def test_an_early_exit_keeps_the_bottom_of_the_stack():
    assert [str(skip_set) for _, skip_set in early_exits(16)] == [
        "attn 15 · mlp 15",
        "attn 14-15 · mlp 14-15",
        "attn 12-15 · mlp 12-15",
        "attn 8-15 · mlp 8-15",
        "attn 4-15 · mlp 4-15",
    ]
