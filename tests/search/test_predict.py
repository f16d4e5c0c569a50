"""Racing: who is looked at to the end, and who is given up."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import FixedLength, SkipSet
from layerskip.costs import CostModel
from layerskip.drafting.config import DraftConfig
from layerskip.engine import EagerEngine
from search.acceptance_tracer import AcceptanceTracer
from search.builder import DraftBuilder
from search.policies import PolicyChoice
from search.predict import SpeedupPredictor
from search.reference import record
from search.simulate import RoundCosts, Simulator
from search.space import SearchSpace
from search.traces import acceptance
from tests.models import LAYERS
from tests.search.searches import known_costs, random_prompts
from tests.strategies import skip_sets

SPACE = SearchSpace(LAYERS, max_draft_length=3)
LIMIT = 5


@pytest.fixture(scope="module")
def parts(llama):
    texts = [record(llama, prompt.tokens, [1, 2, 3, 4, 5][:LIMIT]) for prompt in random_prompts(search=14).search]
    makers = DraftBuilder(llama, texts)
    estimator = AcceptanceTracer(llama, texts)
    return (
        estimator,
        makers,
        SpeedupPredictor(EagerEngine(llama), SPACE, makers, estimator, known_costs(), max_new_tokens=LIMIT),
    )


@given(skip_set=skip_sets(), best=skip_sets(), ease=st.floats(0.5, 2))
@settings(max_examples=60)
def test_only_a_candidate_that_cannot_win_is_given_up_and_at_the_first_sign_of_it(llama, parts, skip_set, best, ease):
    """It is held against the best one on the texts that both were seen on, so that hard texts are hard for both."""
    estimator, makers, predictor = parts
    candidate = DraftConfig(skip_set)
    to_beat = [seconds * ease for seconds in predictor.predict(DraftConfig(best)).simulated.seconds]
    found = predictor.predict(candidate, to_beat)
    stack = makers.stack(candidate)
    seen = []
    for part in estimator.trace(stack):
        seen += part
        costs = RoundCosts.of_stack(known_costs(), stack, EagerEngine(llama), seen, SPACE.most_drafted)
        so_far = PolicyChoice(candidate, SPACE, Simulator(seen, costs, LIMIT)).best()
        slower = np.array(so_far.seconds) - to_beat[: len(seen)]
        error = max(slower.std(ddof=1) / len(seen) ** 0.5, 0.01 * np.mean(so_far.seconds))
        if slower.mean() > 2 * error or len(seen) == estimator.num_texts:
            break
        assert len(so_far.seconds) < len(found.simulated.seconds)
    assert found.simulated == so_far
    assert found.acceptance == acceptance(seen)
    assert found.complete == (len(seen) == estimator.num_texts)


@given(skip_set=skip_sets())
@settings(max_examples=20)
def test_with_nothing_to_beat_all_texts_are_looked_at(parts, skip_set):
    found = parts[2].predict(DraftConfig(skip_set))
    assert found.complete
    assert len(found.simulated.seconds) == 14
    assert found == parts[2].predict(DraftConfig(skip_set))


def test_a_hopeless_candidate_costs_the_first_texts_alone(parts):
    found = parts[2].predict(DraftConfig(SkipSet(LAYERS, mlp=range(LAYERS))), to_beat=[1e-3] * 14)
    assert not found.complete
    assert len(found.simulated.seconds) == 4


def test_the_policy_is_one_of_the_space(parts):
    candidate = DraftConfig(SkipSet(LAYERS, mlp=(2,)))
    assert parts[2].predict(candidate).simulated.config in SPACE.policies(candidate)


@pytest.mark.parametrize(
    ("skip_set", "draft_step", "pays"),
    [(SkipSet(LAYERS), 0.01, True), (SkipSet(LAYERS, mlp=range(LAYERS)), 1e3, False)],
)
def test_a_controller_costs_little_where_drafts_pay_and_saves_where_they_do_not(
    llama, parts, skip_set, draft_step, pays
):
    known = known_costs()
    steps = (replace(at.step, fixed=draft_step * at.plain_step) for at in (known.short, known.long))
    costs = CostModel(*(replace(at, step=step) for at, step in zip((known.short, known.long), steps, strict=True)))
    tracer, builder, _ = parts
    predictor = SpeedupPredictor(EagerEngine(llama), SPACE, builder, tracer, costs, max_new_tokens=LIMIT)
    share = predictor.controlled_share(DraftConfig(skip_set, stopping=FixedLength(1)))
    assert 0.9 < share <= 1 if pays else share > 1.5


def test_why_a_draft_does_not_pay_is_by_its_own_costs(parts):
    candidate = DraftConfig(SkipSet(LAYERS, mlp=(2,)), stopping=FixedLength(2))
    shortfall, prediction = parts[2].shortfall(candidate), parts[2].predict(candidate)
    assert shortfall.acceptance == prediction.acceptance
    assert shortfall.needed.cost == prediction.draft_cost
    costs = known_costs().at(5).relative()
    assert shortfall.verification == pytest.approx(costs.verification(shortfall.needed.length + 1), rel=0.05)
