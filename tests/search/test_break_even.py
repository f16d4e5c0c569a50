"""Whether speculation can pay: the formula against simulation and against itself."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip import LayerSkipModel
from layerskip.costs import speedup
from layerskip.engine import make_engine, measure_costs
from search.break_even import (
    BreakEven,
    DraftBreakEven,
    Shortfall,
    break_even,
    measure_break_even,
    typical_drafts,
)
from search.space import SearchSpace
from tests.models import tiny_llama

lengths = st.integers(1, 8)
costs = st.floats(0.01, 1.5)
verifications = st.floats(1, 9)


@pytest.mark.parametrize(("rate", "length"), [(0.0, 3), (0.4, 1), (0.8, 4), (1.0, 2)])
def test_the_speedup_is_what_rounds_yield_over_what_they_cost(rate, length):
    chance, rounds = random.Random(0), 20_000
    made = 0
    for _ in range(rounds):
        accepted = 0
        while accepted < length and chance.random() < rate:
            accepted += 1
        made += accepted + 1
    assert speedup(rate, length, 0.3, 1.4) == pytest.approx(made / rounds / (length * 0.3 + 1.4), rel=0.02)


@given(lengths, costs, verifications)
def test_at_the_break_even_rate_a_draft_is_as_fast_as_none(length, cost, verification):
    rate = break_even(length, cost, verification)
    if rate is None:
        assert speedup(1.0, length, cost, verification) < 1
    elif rate > 1e-6:
        assert speedup(rate, length, cost, verification) == pytest.approx(1, abs=1e-4)
    else:
        assert speedup(0.0, length, cost, verification) >= 1 - 1e-4


@given(costs, st.lists(verifications, min_size=8, max_size=8))
def test_the_draft_length_is_the_one_that_needs_least_agreement(cost, measured):
    verification = {1: 1.0} | dict(enumerate(measured, start=2))
    found = DraftBreakEven.of("any", cost, verification)
    needed = [break_even(length, cost, verification[length + 1]) for length in range(1, 9)]
    possible = [rate for rate in needed if rate is not None]
    assert found.break_even == min(possible, default=None)
    if possible:
        assert needed[found.length - 1] == found.break_even
    for rate, best in found.speedups.items():
        assert best == max(speedup(rate, length, cost, verification[length + 1]) for length in range(1, 9))


def a_found(*rates):
    drafts = tuple(DraftBreakEven(str(rate), 0.5, rate, 4, {}) for rate in rates)
    return BreakEven(0.01, {1: 1.0}, drafts)


def test_speculation_can_pay_where_some_draft_breaks_even_at_a_rate_that_drafts_reach():
    assert a_found(None, 0.9, 0.7).best.draft == "0.7"
    assert a_found(None, 0.9, 0.7).can_pay
    assert a_found(None, 0.99).best.draft == "0.99"
    assert not a_found(None, 0.99).can_pay
    assert a_found(None, None).best is None
    assert not a_found(None, None).can_pay


@pytest.mark.parametrize(
    ("acceptance", "needed", "words"),
    [
        (
            0.62,
            0.793,
            "62% of its tokens are right, of 79% that it would need: a draft step costs 0.50 of a plain step",
        ),
        (
            1.0,
            None,
            "a draft step costs 0.50 of a plain step here, and verifying 5 tokens 1.38: even a draft that is al",
        ),
        (
            0.9,
            0.7,
            "by its costs it should pay (90% of its tokens are right, of 70% that it would need: a draft step co",
        ),
    ],
)
def test_why_a_draft_does_not_pay_is_said_in_figures(acceptance, needed, words):
    shortfall = Shortfall(acceptance, DraftBreakEven("4 tokens", 0.5, needed, 4, {}), 1.38)
    assert shortfall.describe().startswith(words)


def test_typical_drafts_are_parts_of_the_model():
    space = SearchSpace(30, vocabulary_sizes=(0, 8192, 16384))
    drafts = list(typical_drafts(space).values())
    assert drafts[0].vocabulary == 8192
    assert [(parts.attention, parts.mlp) for parts in drafts] == [(30, 30), (23, 23), (15, 15), (15, 15)]
    without = typical_drafts(SearchSpace(1)).values()
    assert all(0 < parts.attention <= 1 and parts.vocabulary == 0 for parts in without)


def test_what_a_model_costs_is_measured_in_its_own_steps(monkeypatch):
    model, measured = LayerSkipModel(tiny_llama(max_position_embeddings=512)), []

    def kept(*given, **options):
        measured.append(measure_costs(*given, **options))
        return measured[0]

    monkeypatch.setattr("search.break_even.measure_costs", kept)
    found = measure_break_even(make_engine(model))
    assert found.step_seconds == measured[0].at(128).plain_step  # after a text of usual length
    assert found.verification[1] == pytest.approx(1)
    assert sorted(found.verification) == list(range(1, 10))
    assert [draft.draft for draft in found.drafts] == [
        "nothing skipped, int4",
        "nothing skipped, int8",
        "a quarter of the sublayers skipped",
        "half of the sublayers skipped",
        "half of the sublayers skipped, bridged",
    ]
    assert all(draft.cost > 0 for draft in found.drafts)
