"""The formula of the speedup."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.samplers import SpeedupFormula
from tests.search.samplers.problems import even_costs, space_of

rates = st.floats(0, 1)
costs = st.floats(0.01, 2)


def predicted(formula, acceptance, step_cost):
    return formula(np.array([acceptance]), np.array([step_cost]))[0]


@given(st.floats(0, 0.99), costs, st.lists(st.floats(1, 3), min_size=1, max_size=8))
def test_it_is_the_formula_at_its_best_draft_length(acceptance, step_cost, verification):
    by_length = [
        (1 - acceptance ** (length + 1)) / (1 - acceptance) / (length * step_cost + v)
        for length, v in enumerate(verification, start=1)
    ]
    assert predicted(SpeedupFormula(np.array(verification)), acceptance, step_cost) == pytest.approx(max(by_length))


@given(costs)
def test_a_draft_that_is_always_right_yields_every_token(step_cost):
    assert predicted(SpeedupFormula(np.array([1.5])), 1.0, step_cost) == pytest.approx(2 / (step_cost + 1.5))


@given(rates, rates, costs)
def test_more_acceptance_is_never_slower(one, other, step_cost):
    formula = SpeedupFormula.of(even_costs(space_of(1)), 8)
    slower, faster = sorted([one, other])
    assert predicted(formula, slower, step_cost) <= predicted(formula, faster, step_cost)


def test_a_draft_of_one_token_is_verified_in_a_pass_of_two():
    costs = even_costs(space_of(1))
    formula = SpeedupFormula.of(costs, 3)
    assert formula.verification.tolist() == [costs.verification(width) for width in (2, 3, 4)]
