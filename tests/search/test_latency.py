"""What parts cost: measured once, added up, and drawn out to other lengths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import LayerSkipModel, SkipSet
from layerskip.drafting.bridges import blank_bridge
from layerskip.engine import EagerEngine, PassCosts, measure_costs
from search.latency import CostsBehind, LatencyModel, StepCosts, measure_latency
from search.space import SearchSpace
from studies.step_costs import read_parts
from tests.models import LAYERS, VOCABULARY, random_layers, tiny_llama
from tests.search.searches import costs_behind, known_costs
from tests.strategies import skip_sets

SPACE = SearchSpace(LAYERS, max_draft_length=3, bridges=True, vocabularies=(0, VOCABULARY // 2))
seconds = st.floats(1e-6, 10)
passes = st.lists(seconds, min_size=9, max_size=9).map(lambda drawn: dict(enumerate(drawn, start=1)))
pass_costs = st.builds(PassCosts, passes, passes)
steps = st.builds(StepCosts, seconds, seconds, seconds, seconds, st.fixed_dictionaries({0: seconds, 32: seconds}))


def behind(context):
    return st.builds(CostsBehind, st.just(context), steps, pass_costs, seconds)


latencies = st.builds(LatencyModel, behind(64), behind(512))


@pytest.fixture(scope="module")
def measured(llama):
    return measure_latency(EagerEngine(llama), SPACE)


def test_everything_that_a_search_can_ask_for_was_measured_and_costs_something(llama, measured):
    for skip_set in (SkipSet(LAYERS), SkipSet(LAYERS, attention=(1,), mlp=(1, 2)), SkipSet(LAYERS, mlp=range(LAYERS))):
        for context in (1, 30, 64, 5000):
            assert measured.draft_step(llama.stack_of(skip_set), context) > 0
            assert measured.prefill(context) > 0
            for needed in range(1, SPACE.max_draft_length + 2):
                assert measured.verification(needed, 0.5, context, None) > 0
    assert measured.parts(1, 1, 2, VOCABULARY // 2, 9) > 0


def test_lengths_are_those_that_the_model_has_room_for(measured):
    assert (measured.short.context, measured.long.context) == (
        60,
        60,
    )  # 64 positions, and the widest verification of four
    assert measured.parts(1, 1, 0, 0, 1) == measured.parts(1, 1, 0, 0, 999)


def test_the_widths_that_the_engine_would_choose_are_measured(llama):
    assert set(measure_latency(EagerEngine(llama), SPACE).short.passes.sublayers) == {1, 2, 3, 4}
    engine = EagerEngine(LayerSkipModel(tiny_llama()))
    choice = engine.costs = PassCosts({1: 1.0, 2: 9.0, 12: 5.0}, dict.fromkeys((1, 2, 12), 0.0))
    latency = measure_latency(engine, SPACE)
    assert set(latency.short.passes.sublayers) == {1, 12}
    assert engine.costs is choice
    otherwise = measure_costs(engine, (1, 2, 3, 4))  # as after the costs on disk were lost
    assert all(latency.verification(needed, 0.5, 9, otherwise) > 0 for needed in range(1, 5))


@given(latencies)
@settings(max_examples=50)
def test_a_latency_model_survives_the_way_through_the_database(latency):
    assert LatencyModel.from_json(latency.as_json()) == latency


@given(steps, st.tuples(*[st.integers(0, 40)] * 3), st.tuples(*[st.integers(0, 40)] * 3), st.sampled_from([0, 32]))
def test_parts_add_up(step, one, other, vocabulary):
    both = [a + b for a, b in zip(one, other, strict=True)]
    nothing = step.seconds(0, 0, 0, vocabulary)
    together = step.seconds(*both, vocabulary)
    apart = step.seconds(*one, vocabulary) + step.seconds(*other, vocabulary)
    assert math.isclose(together + nothing, apart)
    assert math.isclose(nothing, step.fixed + step.head[vocabulary])


@given(skip_set=skip_sets(), context=st.integers(1, 100), bridged=st.booleans(), small=st.booleans())
@settings(max_examples=40)
def test_a_draft_costs_what_it_is_made_of(llama, skip_set, context, bridged, small):
    stand_ins = {skip_set.mask.index(True): blank_bridge(llama)} if bridged else {}
    token_ids = torch.arange(VOCABULARY // 2) if small else None
    stack = llama.stack_of(skip_set, stand_ins=stand_ins, token_ids=token_ids)
    latency = known_costs(SPACE)
    kept = (LAYERS - len(skip_set.attention), LAYERS - len(skip_set.mlp))
    expected = latency.parts(*kept, len(stand_ins), VOCABULARY // 2 if small else 0, context)
    assert latency.draft_step(stack, context) == expected


def test_a_layer_of_the_drafts_own_costs_what_one_of_the_models_does(llama):
    exited = SkipSet(LAYERS, range(1, LAYERS), range(1, LAYERS))
    stand_ins = {2: random_layers(llama, {2: 2 * LAYERS})[0]}
    latency = known_costs(SPACE)
    expected = latency.draft_step(llama.stack_of(SkipSet(LAYERS, range(2, LAYERS), range(2, LAYERS))), 70)
    assert latency.draft_step(llama.stack_of(exited, stand_ins=stand_ins), 70) == expected


@given(latencies, st.floats(64, 512))
def test_between_two_lengths_costs_lie_on_the_line(latency, context):
    near, far = (costs.step.seconds(3, 2, 1, 32) for costs in (latency.short, latency.long))
    assert math.isclose(latency.parts(3, 2, 1, 32, 64), near)
    assert math.isclose(latency.parts(3, 2, 1, 32, 512), far)
    share = (context - 64) / (512 - 64)
    assert math.isclose(latency.parts(3, 2, 1, 32, context), near + share * (far - near))


@given(latencies, st.integers(1, 200_000))
@settings(max_examples=300)
def test_no_length_makes_anything_free(latency, context):
    assert latency.parts(1, 1, 1, 0, context) > 0
    assert latency.verification(4, 0.0, context, None) > 0
    assert latency.prefill(context) > 0


@given(pass_costs, pass_costs, st.integers(1, 9), st.floats(0, 1))
def test_verification_costs_what_the_way_that_the_engine_chooses_costs(measured_here, choice, needed, shared):
    costs = CostsBehind(64, known_costs().short.step, measured_here, 1.0)
    latency = LatencyModel(costs, costs)
    assert latency.verification(needed, shared, 9, None) == measured_here.seconds(needed)
    width = choice.cheapest_width(needed)
    expected = measured_here.seconds(width)
    if choice.saved_by_resuming(width, shared) > 0:
        expected -= measured_here.saved_by_resuming(width, shared)
    assert math.isclose(latency.verification(needed, shared, 9, choice), expected)
    assert latency.verification(needed, 0.0, 9, choice) == measured_here.seconds(width)


def test_a_model_that_cannot_tell_two_lengths_apart_has_one_cost_for_all():
    costs = costs_behind(20)
    latency = LatencyModel(costs, costs)
    assert {latency.prefill(length) for length in (1, 20, 300)} == {20}


def test_what_a_search_keeps_is_what_reports_read():
    latency = known_costs()
    parts = read_parts(latency.as_json())
    plain = latency.verification(1, 0.0, parts.context, None)
    assert parts.plain_seconds == pytest.approx(plain)
    assert parts.verifying(5) == pytest.approx(latency.verification(5, 0.0, parts.context, None) / plain)
    step = 3 * parts.attention + 2 * parts.mlp + parts.bridge + parts.head[0] + parts.fixed
    assert step == pytest.approx(latency.parts(3, 2, 1, 0, parts.context) / plain)
