"""Generators that also return something."""

import pytest

from layerskip.generators import Drained


def counting(end, closed):
    try:
        yield from range(end)
    finally:
        closed.append(True)
    return "all"


def test_a_loop_gets_what_is_yielded_and_then_what_was_returned():
    drained = Drained(counting(3, closed := []))
    assert list(drained) == [0, 1, 2]
    assert (drained.returned, closed) == ("all", [True])


def test_a_loop_that_is_left_early_closes_the_generator():
    drained = Drained(counting(3, closed := []))
    for one in drained:
        if one == 1:
            break
    assert closed == [True]
    with pytest.raises(AttributeError):
        _ = drained.returned
