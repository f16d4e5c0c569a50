"""The formula of the speedup, for many drafts at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip.costs import best_speedup
from search.samplers import DraftCosts
from tests.search.samplers.problems import costs_of_widths, even_costs, no_bridges, space_of

rates = st.floats(0, 1)
steps = st.floats(0.01, 2)


def costs_with(verification):
    """Costs of drafts of 1, 2, ... tokens."""
    return DraftCosts(costs_of_widths([1.0, *verification]), no_bridges, len(verification))


def predicted(costs, acceptance, step_cost):
    return costs.best_speedups(np.array([acceptance]), np.array([step_cost]))[0]


@given(st.floats(0, 0.99), steps, st.lists(st.floats(1, 3), min_size=1, max_size=8).map(sorted))
def test_it_is_the_formula_at_its_best_draft_length(acceptance, step_cost, verification):
    by_length = [
        (1 - acceptance ** (length + 1)) / (1 - acceptance) / (length * step_cost + v)
        for length, v in enumerate(verification, start=1)
    ]
    costs = costs_with(verification)
    found = predicted(costs, acceptance, step_cost)
    assert found == pytest.approx(max(by_length))
    assert found == pytest.approx(best_speedup(acceptance, step_cost, costs.costs.verification, len(verification)))


@given(steps)
def test_a_draft_that_is_always_right_yields_every_token(step_cost):
    assert predicted(costs_with([1.5]), 1.0, step_cost) == pytest.approx(2 / (step_cost + 1.5))


@given(rates, rates, steps)
def test_more_acceptance_is_never_slower(one, other, step_cost):
    costs = even_costs(space_of(1))
    slower, faster = sorted([one, other])
    assert predicted(costs, slower, step_cost) <= predicted(costs, faster, step_cost)


def test_a_draft_of_one_token_is_verified_in_a_pass_of_two():
    assert costs_with([1.1, 1.2, 1.3]).verification.tolist() == [1.1, 1.2, 1.3]
