"""Simulated drafts of heads are those of decoding, round by round."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import ConfidenceThreshold, DraftConfig, FixedLength, PromptLookup, SkipSet, generate
from layerskip.costs import DraftRoundCosts
from layerskip.drafting.factory import make_drafter
from layerskip.drafting.heads import HEAD_KINDS
from layerskip.drafting.weights import DraftWeights
from layerskip.target_texts import batch_generate
from layerskip.utils import device_name
from search.head_costs import HeadCosts
from search.reference import record
from search.simulate import RoundCosts, Simulator
from search.space import SearchSpace
from search.traces import LAST_RANK, LookupTrace, trace_heads, trace_lookups
from tests.models import LAYERS, random_heads, random_prefix
from tests.search.traces import head_trace
from tests.strategies import bushes

LIMIT = 20
HEADS = 3
IDS = [None, torch.arange(3, 50)]
LOOKUPS = SearchSpace(LAYERS, prompt_lookup=True).prompt_lookups


def costs_of(places, verification, *, prefill=0.0, at_once=True):
    """Costs on one text of drafting that takes so long for each place, after however many tokens."""
    heads = HeadCosts(0.0, [[place] for place in places], [1])
    passes = np.array([verification])
    return RoundCosts(np.array([prefill]), lambda ways: np.array([heads.seconds(ways)]), passes, passes, at_once)


# Costs by which a text takes as many seconds as rounds.
ROUNDS = costs_of([0.0] * HEADS, [1.0] * 64)


def policy_of(stopping, threshold=0.0, tree=(), prompt_lookup=None):
    """A configuration with this policy."""
    return DraftConfig(SkipSet(LAYERS), False, None, 0, stopping, threshold, tree, prompt_lookup)


@pytest.fixture(scope="module")
def texts(tiny):
    prompts = [[first, 7, 5] for first in range(4)]
    return [record(tiny, p, new) for p, new in zip(prompts, batch_generate(tiny, prompts, LIMIT), strict=True)]


def real_and_simulated(model, weights, policy, text):
    prompt, drafter = text.tokens[: text.prompt_length], make_drafter(model, policy, weights)
    stats = generate(model, prompt, drafter=drafter, max_new_tokens=LIMIT, eos_token_ids=[]).stats
    lookups = trace_lookups([policy.prompt_lookup] if policy.prompt_lookup else [], [text], HEADS)
    [simulated] = Simulator(trace_heads(model, weights, [text]), ROUNDS, LIMIT, lookups).simulate([policy])
    return stats, simulated


@given(
    kind=st.sampled_from(HEAD_KINDS),
    stopping=st.one_of(
        st.builds(FixedLength, st.integers(1, 5)),
        st.builds(ConfidenceThreshold, threshold=st.sampled_from([0.1, 0.3, 0.7]), max_length=st.integers(1, 5)),
    ),
    threshold=st.sampled_from([0.0, 0.3, 0.6]),
    tree=bushes(),
    ids=st.sampled_from([0, 1]),
    lookup=st.sampled_from([None, *LOOKUPS]),
)
@settings(max_examples=25)
def test_simulated_rounds_are_those_of_decoding(tiny, texts, kind, stopping, threshold, tree, ids, lookup):
    """But for how a draft goes on after a wrong token, by Hydra's heads or by copies, which is not in a trace."""
    weights = DraftWeights(token_ids=IDS[ids], heads=random_heads(tiny, kind, HEADS, scale=0.02))
    for text in texts:
        stats, simulated = real_and_simulated(tiny, weights, policy_of(stopping, threshold, tree, lookup), text)
        assert simulated.seconds == (stats.rounds,)
        if lookup is None and (kind == "medusa" or isinstance(stopping, FixedLength)):
            assert simulated.acceptance_rate == pytest.approx(stats.acceptance_rate)


@given(
    stopping=st.one_of(
        st.builds(FixedLength, st.integers(1, 4)),
        st.builds(ConfidenceThreshold, threshold=st.sampled_from([0.1, 0.3]), max_length=st.integers(1, 4)),
    ),
    threshold=st.sampled_from([0.0, 0.3]),
    tree=st.lists(st.integers(1, 6), max_size=3).map(tuple),
    scale=st.sampled_from([0.02, 0.3]),
)
@settings(max_examples=10)
def test_simulated_rounds_of_heads_after_a_layer_are_those_of_decoding(tiny, texts, stopping, threshold, tree, scale):
    heads = random_heads(tiny, "hydra", HEADS, scale=0.02)
    weights = DraftWeights(layers=[random_prefix(tiny, scale=scale)], heads=heads)
    for text in texts:
        stats, simulated = real_and_simulated(tiny, weights, policy_of(stopping, threshold, tree), text)
        assert simulated.seconds == (stats.rounds,)
        if isinstance(stopping, FixedLength):
            assert simulated.acceptance_rate == pytest.approx(stats.acceptance_rate)


@given(
    length=st.integers(1, 3),
    drafting=st.sampled_from([0.1, 0.6, 2.0]),
    scale=st.sampled_from([0.0, 0.02]),
    lookup=st.sampled_from([None, PromptLookup(1, 1)]),
)
@settings(max_examples=25)
def test_simulated_pauses_are_those_of_decoding(tiny, texts, length, drafting, scale, lookup):
    """Of drafts that pay or do not; a copy of one token continues none."""
    weights = DraftWeights(heads=random_heads(tiny, "medusa", HEADS, scale=scale))
    policy = policy_of(FixedLength(length), prompt_lookup=lookup)
    per_place = tuple((drafting * places, drafting * places) for places in range(HEADS + 1))
    passes = tuple((1 + 0.25 * drafted, 1 + 0.25 * drafted) for drafted in range(HEADS + 1))
    where = (device_name(tiny.device), "float32", "eager", (64, 512))
    costs = DraftRoundCosts(*where, per_place, ((0, 0),) * len(per_place), tuple(range(1, HEADS + 2)), passes)
    simulated_costs = costs_of([drafting] * HEADS, [1 + 0.25 * drafted for drafted in range(64)], at_once=False)
    for text in texts:
        prompt, drafter = text.tokens[: text.prompt_length], make_drafter(tiny, policy, weights, costs=costs)
        for _ in range(2):  # the controllers have seen the text before
            stats = generate(tiny, prompt, drafter=drafter, max_new_tokens=LIMIT, eos_token_ids=[]).stats
        lookups = trace_lookups([lookup] if lookup else [], [text], HEADS)
        traces = trace_heads(tiny, weights, [text])
        [simulated] = Simulator(traces, simulated_costs, LIMIT, lookups, controlled=True).simulate([policy])
        if lookup is None:  # or some of what was drafted cost nothing
            assert simulated.seconds[0] == pytest.approx(stats.rounds + (0.25 + drafting) * stats.drafted)
        assert simulated.acceptance_rate == pytest.approx(stats.acceptance_rate)


def test_rounds_cost_what_their_places_and_passes_cost():
    """Heads that are never right, with and without a rest after the first round."""
    wrong = head_trace([LAST_RANK] * 9, [LAST_RANK] * 8)
    costs = costs_of([0.1, 0.2], [1.0, 1.1, 1.2, 2.0], prefill=1.0, at_once=False)
    policies = [policy_of(FixedLength(2)), policy_of(FixedLength(2), 0.9)]
    never, rests = Simulator([wrong], costs, 10).simulate(policies)
    # The prompt, and a draft of two places in vain for each of the first seven tokens.
    assert never.seconds == (pytest.approx(1.0 + 7 * (0.3 + 1.2) + (0.1 + 1.1) + 1.0),)
    # One draft in vain, then eight plain steps; plain decoding takes the prompt and nine steps.
    assert rests.seconds == (pytest.approx(1.0 + 0.3 + 1.2 + 8 * 1.0),)
    assert rests.speedup == pytest.approx(10.0 / rests.seconds[0])


def test_copies_cost_nothing_to_draft():
    """The heads that would have drafted are not asked."""
    trace = head_trace([LAST_RANK] * 9)
    copies = LookupTrace(np.ones((10, 2), dtype=int), np.zeros((10, 2), dtype=int))
    heads = HeadCosts(5.0, [[1.0]], [1])
    costs = RoundCosts(np.zeros(1), lambda ways: np.array([heads.seconds(ways)]), np.ones((1, 3)), np.ones((1, 3)))
    policy = policy_of(FixedLength(1), prompt_lookup=PromptLookup(1, 1))
    [simulated] = Simulator([trace], costs, 10, {policy.prompt_lookup: [copies]}).simulate([policy])
    assert simulated.seconds[0] == pytest.approx(8 + 6)  # eight rounds with a copy, and one without room for any


def test_heads_that_run_at_once_cost_as_much_however_early_a_draft_ends():
    trace, policy = head_trace([0] * 9, [0] * 8, confidence=0.1), policy_of(ConfidenceThreshold(0.5, 2))
    seconds = []
    for at_once in (True, False):
        [simulated] = Simulator([trace], costs_of([1.0, 9.0], [0.0] * 4, at_once=at_once), 10).simulate([policy])
        seconds += simulated.seconds
    # Four rounds draft one token each and give two; after them there is no room to draft.
    assert seconds == [4 * 10.0, 4 * 1.0]
