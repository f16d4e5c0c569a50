"""Costs add up by parts, are drawn out to other lengths of text, and tell how a pass is run."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import SkipSet
from layerskip.costs import CostModel, Costs, DraftParts, PassCosts, StepCosts
from layerskip.drafting.bridges import blank_bridge
from layerskip.drafting.weights import DraftWeights
from tests.models import LAYERS, VOCABULARY, random_layers
from tests.strategies import low_precisions, precisions, skip_sets

seconds = st.floats(1e-6, 10)
by_width = st.lists(seconds, min_size=9, max_size=9).map(lambda drawn: dict(enumerate(drawn, start=1)))
passes = st.builds(PassCosts, by_width, by_width)
steps = st.builds(StepCosts, seconds, seconds, seconds, seconds, st.fixed_dictionaries({0: seconds, 32: seconds}))
counts = st.integers(0, 40)
parts = st.builds(DraftParts, counts, counts, counts, st.sampled_from([0, 32]), precisions(), counts)


COPIES = {"int8": steps, "int4": steps}


def costs_after(context):
    return st.builds(Costs, st.just(float(context)), steps, passes, seconds, st.fixed_dictionaries(COPIES))


models = st.builds(CostModel, costs_after(64), costs_after(512))


def test_a_head_that_seems_to_take_longer_than_the_pass_leaves_something_for_the_sublayers():
    costs = PassCosts.of({1: 1.0, 2: 4.0}, {1: 2.0, 2: 1.0})
    assert costs.sublayers[1] > 0
    assert costs.cost(1) == pytest.approx(1.0)
    assert (costs.sublayers[2], costs.head[2]) == (3.0, 1.0)


@given(models)
@settings(max_examples=50)
def test_a_cost_model_survives_the_way_through_the_database(model):
    text = model.to_json()
    assert CostModel.from_json(text) == model
    assert max(map(len, text.split())) < 40  # the dashboard's page breaks lines at spaces alone


@pytest.mark.parametrize("text", ["", "no JSON", "{}", "[]", json.dumps({"short": 1, "long": 2})])
def test_a_text_that_is_no_cost_model_is_refused(text):
    with pytest.raises(ValueError, match="CostModel"):
        CostModel.from_json(text)


@given(costs_after(64), parts, parts)
def test_parts_add_up(costs, one, other):
    other = replace(other, vocabulary=one.vocabulary, precision=one.precision)
    counted = ("attention", "mlp", "bridges", "layers")
    both = replace(one, **{name: getattr(one, name) + getattr(other, name) for name in counted})
    nothing = replace(one, **dict.fromkeys(counted, 0))
    apart = costs.draft_step(one) + costs.draft_step(other)
    assert math.isclose(costs.draft_step(both) + costs.draft_step(nothing), apart)
    step = costs.step if one.precision == "full" else costs.copies[one.precision]
    assert math.isclose(costs.draft_step(nothing), step.fixed + step.head[one.vocabulary])


@given(costs_after(64), low_precisions())
def test_what_stands_in_for_sublayers_costs_the_same_at_every_precision(costs, precision):
    for part in ({"bridges": 1}, {"layers": 1}):
        full, lower = (
            costs.draft_step(DraftParts(0, 0, precision=p, **part)) - costs.draft_step(DraftParts(0, 0, precision=p))
            for p in ("full", precision)
        )
        assert math.isclose(full, lower, abs_tol=1e-9)


@given(models)
@settings(max_examples=10)
def test_costs_that_were_stored_before_there_were_precisions_still_load(model):
    stored = json.loads(model.to_json())
    for costs in stored.values():
        del costs["copies"]
    loaded = CostModel.from_json(json.dumps(stored))
    assert loaded.precisions == ("full",)
    assert model.precisions == ("full", "int8", "int4")
    assert loaded.short.step == model.short.step


@given(skip_set=skip_sets(), bridged=st.booleans(), small=st.booleans(), precision=precisions())
@settings(max_examples=40)
def test_a_stack_consists_of_what_runs(llama, skip_set, bridged, small, precision):
    stand_ins = {skip_set.mask.index(True): blank_bridge(llama)} if bridged and len(skip_set) else {}
    token_ids = torch.arange(VOCABULARY // 2) if small else None
    stack = llama.stack_of(skip_set, stand_ins=stand_ins, token_ids=token_ids, precision=precision)
    kept = (LAYERS - len(skip_set.attention), LAYERS - len(skip_set.mlp))
    assert DraftParts.of(stack) == DraftParts(*kept, len(stand_ins), VOCABULARY // 2 if small else 0, precision)


def test_a_layer_of_the_drafts_own_costs_as_much_as_one_of_the_models(llama):
    exited = SkipSet(LAYERS, range(1, LAYERS), range(1, LAYERS))
    stand_ins = DraftWeights(layers=random_layers(llama, {2: 2 * LAYERS})).steps
    parts = DraftParts.of(llama.stack_of(exited, stand_ins=stand_ins))
    assert parts == DraftParts(1, 1, layers=1)
    costs = Costs(20.0, StepCosts(1.0, 2.0, 3.0, 0.5, {0: 4.0}), PassCosts({1: 20.0}, {1: 4.0}), 20.0)
    assert costs.draft_step(parts) == costs.draft_step(DraftParts(2, 2))


@given(models, parts, st.floats(64, 512))
def test_between_two_lengths_costs_lie_on_the_line(model, parts, context):
    near, far = (costs.draft_step(parts) for costs in (model.short, model.long))
    assert math.isclose(model.at(64).draft_step(parts), near)
    assert math.isclose(model.at(512).draft_step(parts), far)
    share = (context - 64) / (512 - 64)
    assert math.isclose(model.at(context).draft_step(parts), near + share * (far - near))


@given(models, st.integers(1, 200_000))
@settings(max_examples=300)
def test_no_length_makes_anything_free(model, context):
    costs = model.at(context)
    assert costs.draft_step(DraftParts(1, 1, 1, 0)) > 0
    assert costs.verification(4) > 0
    assert costs.prefill > 0


@given(models)
def test_what_seems_to_get_cheaper_with_the_length_of_the_text_is_not_drawn_out(model):
    shorter, longer = model.at(1).step.attention, model.at(10**6).step.attention
    if model.long.step.attention < model.short.step.attention:
        assert math.isclose(shorter, model.short.step.attention)
        assert math.isclose(longer, model.long.step.attention)


@given(costs_after(64), st.integers(1, 9), st.floats(0, 1))
def test_a_verification_costs_what_the_cheapest_way_to_run_it_costs(costs, tokens, shared):
    width = costs.passes.cheapest_width(tokens)
    assert costs.verification(tokens) == min(costs.passes.cost(wide) for wide in range(tokens, 10))
    expected = costs.passes.cost(width) - max(costs.passes.saved_by_resuming(width, shared), 0)
    assert math.isclose(costs.verification(tokens, shared), expected)


@given(st.integers(1, 20))
def test_a_pass_costs_what_the_cheapest_measured_width_with_room_costs(tokens):
    sublayers = {width: 1 + 0.04 * (width - 1) for width in (1, 2, 4, 8, 12)}
    passes = PassCosts(sublayers, dict.fromkeys(sublayers, 0.01))
    costs = Costs(64.0, StepCosts(0.0, 0.0, 0.0, 0.0, {}), passes, 0.1)
    widths = [width for width in sublayers if width >= tokens] or [12]
    assert costs.verification(tokens) == min(map(passes.cost, widths))


def test_a_model_that_cannot_tell_two_lengths_apart_has_one_cost_for_all():
    costs = Costs(20.0, StepCosts(1.0, 2.0, 3.0, 0.5, {0: 4.0}), PassCosts({1: 20.0}, {1: 4.0}), 20.0)
    model = CostModel(costs, costs)
    assert {model.at(length).prefill for length in (1, 20, 300)} == {20}


@given(costs_after(64), parts, st.integers(1, 9))
def test_relative_costs_are_in_plain_decoding_steps(costs, parts, tokens):
    relative = costs.relative()
    assert math.isclose(relative.plain_step, 1)
    assert relative.context == costs.context
    assert math.isclose(relative.draft_step(parts), costs.draft_step(parts) / costs.plain_step)
    assert math.isclose(relative.verification(tokens), costs.verification(tokens) / costs.plain_step)
