"""Ranking sublayers by what leaving out each alone costs in acceptance."""

import math

from hypothesis import given
from hypothesis import strategies as st

from search.starting_skip_sets import least_damage, skipping_few


def alone(acceptance):
    """An estimate that knows what leaving out each sublayer alone does."""

    def estimate(skip_set):
        (index,) = (index for index, skip in enumerate(skip_set.mask) if skip)
        return acceptance[index]

    return estimate


sublayers = st.integers(1, 20).flatmap(
    lambda num_layers: st.lists(
        st.tuples(st.floats(0, 1), st.floats(0.1, 5)), min_size=2 * num_layers, max_size=2 * num_layers
    )
)


@given(sublayers)
def test_no_sublayer_that_is_kept_does_less_damage_for_its_cost(drawn):
    acceptance, costs = zip(*drawn, strict=True)
    ratios = [(-math.log(a) if a else math.inf) / cost for a, cost in drawn]
    starts = list(least_damage(alone(acceptance), costs))
    sizes = [len(skip_set) for _, skip_set in starts]
    assert sizes == sorted(set(sizes))
    for _, skip_set in starts:
        left_out = [ratio for ratio, skip in zip(ratios, skip_set.mask, strict=True) if skip]
        assert max(left_out) <= min(ratios[index] for index in skip_set.kept)


def test_of_two_that_do_no_damage_the_dearer_goes_first():
    ((_, skip_set),) = least_damage(alone([1.0, 1.0]), [1.0, 3.0])
    assert (skip_set.attention, skip_set.mlp) == ((), (0,))


def test_a_sublayer_without_which_drafts_always_fail_goes_last():
    starts = list(least_damage(alone([0.0, 0.5, 0.9, 0.01]), [100.0, 1.0, 1.0, 1.0]))
    assert all(0 not in skip_set.attention for _, skip_set in starts)


@given(sublayers, st.data())
def test_below_an_exit_a_few_are_left_out_and_nothing_above_is_asked_about(drawn, data):
    acceptance, costs = zip(*drawn, strict=True)
    exit_at = data.draw(st.integers(1, len(drawn) - 1))
    known = [*acceptance[:exit_at], *[None] * (len(drawn) - exit_at)]
    starts = list(skipping_few(exit_at, alone(known), costs))
    assert [len(skip_set) for _, skip_set in starts] == [count for count in (1, 2, 4) if count < exit_at]
    for _, skip_set in starts:
        assert not any(skip_set.mask[exit_at:])
        assert not all(skip_set.mask[:exit_at])
