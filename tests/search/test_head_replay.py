"""Replay of heads' drafts says what decoding with them does, round by round."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import ConfidenceThreshold, FixedLength, SkipSet, generate
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.factory import make_drafter
from layerskip.drafting.heads import HEAD_KINDS
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine
from layerskip.target_texts import batch_generate
from layerskip.token_tree import TokenTree, widths_of
from search.acceptance import LAST_RANK
from search.copying import copies_along, settings_of_ngrams
from search.head_replay import (
    DraftSeconds,
    HeadCosts,
    HeadTrace,
    best_tree,
    head_policies,
    measure_drafts,
    replay_heads,
    trace_heads,
)
from search.reference import record
from search.space import SearchSpace
from tests.models import LAYERS, random_heads, random_prefix
from tests.strategies import bushes

LIMIT = 20
HEADS = 3
MOST = 64
IDS = [None, torch.arange(3, 50)]


def rounds_alone(count=1, at_once=True):
    """Costs by which a text takes as many seconds as rounds."""
    return HeadCosts(seconds_of(*[0.0] * HEADS), [0.0] * count, [[1.0] * MOST] * count, at_once)


def policy_of(stopping, threshold=0.0, tree=(), prompt_lookup=None):
    """A configuration with this policy."""
    nothing = SkipSet(LAYERS)
    return DraftConfig(nothing, False, None, 0, stopping, threshold, tree, prompt_lookup)


def seconds_of(*places):
    """Drafting that takes so long for each place, behind however many tokens."""
    return DraftSeconds(0.0, [[place] for place in places], [1])


@pytest.fixture(scope="module")
def texts(tiny):
    prompts = [[first, 7, 5] for first in range(4)]
    return [record(tiny, p, new) for p, new in zip(prompts, batch_generate(tiny, prompts, LIMIT), strict=True)]


@given(
    kind=st.sampled_from(HEAD_KINDS),
    draft_exit=st.one_of(
        st.builds(FixedLength, st.integers(1, 5)),
        st.builds(ConfidenceThreshold, threshold=st.sampled_from([0.1, 0.3, 0.7]), max_length=st.integers(1, 5)),
    ),
    gate=st.sampled_from([0.0, 0.3, 0.6]),
    branches=bushes(),
    ids=st.sampled_from([0, 1]),
    ngrams=st.sampled_from([None, *settings_of_ngrams()]),
)
@settings(max_examples=25)
def test_replay_says_what_decoding_does(tiny, texts, kind, draft_exit, gate, branches, ids, ngrams):
    """But for how far Hydra's drafts go on behind a wrong token, which a text cannot tell."""
    heads, policy = random_heads(tiny, kind, HEADS, scale=0.02), policy_of(draft_exit, gate, branches, ngrams)
    drafter = make_drafter(tiny, policy, DraftWeights(token_ids=IDS[ids], heads=heads))
    stack = tiny.stack_of(SkipSet(LAYERS), token_ids=IDS[ids])
    for text in texts:
        prompt = text.tokens[: text.prompt_length]
        stats = generate(tiny, prompt, drafter=drafter, max_new_tokens=LIMIT, eos_token_ids=[]).stats
        traces, copies = [trace_heads(tiny, heads, stack, text)], copies_along([text])
        foretold = replay_heads(traces, [policy], rounds_alone(), limit=LIMIT, copies=copies)
        assert foretold.seconds == (stats.rounds,)
        if kind == "medusa" or isinstance(draft_exit, FixedLength):
            assert foretold.acceptance_rate == pytest.approx(stats.acceptance_rate)


@given(
    draft_exit=st.one_of(
        st.builds(FixedLength, st.integers(1, 4)),
        st.builds(ConfidenceThreshold, threshold=st.sampled_from([0.1, 0.3]), max_length=st.integers(1, 4)),
    ),
    gate=st.sampled_from([0.0, 0.3]),
    branches=st.lists(st.integers(1, 6), max_size=3).map(tuple),
    scale=st.sampled_from([0.02, 0.3]),
)
@settings(max_examples=10)
def test_replay_says_what_heads_behind_a_layer_do(tiny, texts, draft_exit, gate, branches, scale):
    heads, policy = random_heads(tiny, "hydra", HEADS, scale=0.02), policy_of(draft_exit, gate, branches)
    prefix = random_prefix(tiny, scale=scale)
    drafter = make_drafter(tiny, policy, DraftWeights(layers=[prefix], heads=heads))
    for text in texts:
        prompt = text.tokens[: text.prompt_length]
        stats = generate(tiny, prompt, drafter=drafter, max_new_tokens=LIMIT, eos_token_ids=[]).stats
        traces = [trace_heads(tiny, heads, tiny.stack_of(SkipSet(LAYERS)), text, prefix)]
        foretold = replay_heads(traces, [policy], rounds_alone(), limit=LIMIT)
        assert foretold.seconds == (stats.rounds,)
        if isinstance(draft_exit, FixedLength):
            assert foretold.acceptance_rate == pytest.approx(stats.acceptance_rate)


def a_trace(*ranks, confidence=0.5, target=0.5):
    count = len(ranks[0])
    return HeadTrace(
        tuple(np.array(row, int) for row in ranks),
        tuple(np.full(len(row), confidence) for row in ranks),
        np.full(count, target),
        3,
        count + 1,
    )


def test_a_tree_has_the_tokens_that_texts_run_through_most():
    # By place, for each newest token: the text runs 0-0, 0-1, 1-2 and 1-2, then 1-0, 3 and 2.
    trace = a_trace([0, 0, 1, 1, 1, 3, 2], [0, 1, 2, 2, 0, LAST_RANK])
    assert best_tree([trace], 1, 2) == (2,)
    assert best_tree([trace], 2, 2) == (1, 1)
    assert best_tree([trace], 2, 3) == (2, 1)
    # Of tokens that add as much the shallower come first; behind 1 the text never goes on with 1, and so not with 2.
    assert best_tree([trace], 2, 6) == (4, 2)
    assert best_tree([trace], 2, 7) == (4, (2, 1))


@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * HEADS), min_size=1, max_size=30),
    st.integers(1, HEADS),
    st.integers(0, 20),
)
def test_a_tree_has_its_size_and_depth(paths, depth, more):
    trace = a_trace(*[[path[place] for path in paths][: len(paths) - place] for place in range(HEADS)])
    tree = TokenTree.grown(widths_of(best_tree([trace], depth, depth + more)))
    assert (len(tree.parents), tree.depth) == (depth + more, depth)


def test_texts_shorter_than_a_draft_have_traces_all_the_same(tiny):
    [new] = batch_generate(tiny, [[1, 2]], 2)
    stack = tiny.stack_of(SkipSet(LAYERS))
    trace = trace_heads(tiny, random_heads(tiny, "hydra", HEADS), stack, record(tiny, [1, 2], new))
    assert [len(ranks) for ranks in trace.ranks] == [1, 0, 0]


def test_the_fastest_policy_is_found():
    """Heads that are always right, then heads that are never right."""
    right, wrong = a_trace([0] * 9, [0] * 8), a_trace([LAST_RANK] * 9, [LAST_RANK] * 8)
    costs = HeadCosts(seconds_of(0.1, 0.2), [1.0], [[1.0, 1.1, 1.2, 2.0]], at_once=False)
    policies = [policy_of(FixedLength(1)), policy_of(FixedLength(2)), policy_of(FixedLength(2), 0.9)]
    assert replay_heads([right], policies, costs, limit=10).config == policy_of(FixedLength(2))
    best = replay_heads([wrong], policies, costs, limit=10)
    assert best.config == policy_of(FixedLength(2), 0.9)  # rests after the first round
    # Plain: the prompt and nine steps. Gated: one draft of two in vain, then eight plain steps.
    assert best.speedup == pytest.approx(10.0 / (1.0 + 0.3 + 1.2 + 8 * 1.0))


def test_heads_that_are_asked_at_once_cost_as_many_however_early_a_draft_ends():
    trace, policy = a_trace([0] * 9, [0] * 8, confidence=0.1), policy_of(ConfidenceThreshold(0.5, 2))
    seconds = []
    for at_once in (True, False):
        costs = HeadCosts(seconds_of(1.0, 9.0), [0.0], [[0.0] * 4], at_once)
        [one] = replay_heads([trace], [policy], costs, limit=10).seconds
        seconds.append(one)
    # Four rounds draft one token each and give two; behind them there is no room to draft.
    assert seconds == [4 * 10.0, 4 * 1.0]


def test_every_length_threshold_gate_and_shape_is_tried():
    space = SearchSpace(4, target_confidence_thresholds=(0.0, 0.5), tree_sizes=(3, 7))
    policies = list(head_policies(policy_of(FixedLength()), [a_trace([0, 1, 0, 3], [0, 2, 1])], 2, space))
    assert len(set(policies)) == len(policies)
    assert {policy.stopping.new_state().max_length for policy in policies} == {1, 2}
    assert {len(TokenTree.grown(widths_of(policy.tree)).parents) for policy in policies} == {0, 3, 7}
    assert {policy.target_confidence_threshold for policy in policies} == {0.0, 0.5}


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_drafts_of_every_length_are_timed(tiny, kind):
    seconds = measure_drafts(EagerEngine(tiny), DraftWeights(heads=random_heads(tiny, kind, HEADS)))
    assert seconds.base > 0
    assert len(seconds.places) == HEADS
    assert all(len(place) == len(seconds.ways) for place in seconds.places)
    assert seconds.of([1, 2, 3]) > seconds.base


def test_seconds_between_measured_numbers_of_tokens_are_interpolated():
    seconds = DraftSeconds(1.0, [[0.5, 0.5], [2.0, 4.0]], [1, 3])
    assert seconds.of([]) == 1.0
    assert seconds.of([1]) == 1.5
    assert seconds.of([1, 2]) == 4.5


def test_the_layer_before_heads_is_timed_with_every_draft_behind_a_text_of_usual_length(llama, monkeypatch):
    seen, run = [], DraftLayer.__call__

    def watched(self, x, context):
        seen.append((x.shape[1], context.cache.length))
        return run(self, x, context)

    monkeypatch.setattr(DraftLayer, "__call__", watched)
    layers = [random_prefix(llama)]
    ways = measure_drafts(EagerEngine(llama), DraftWeights(layers=layers, heads=random_heads(llama, "hydra", 2))).ways
    first, rest = seen[: len(ways)], seen[len(ways) :]
    assert first == [(130, 0)] * len(ways)
    assert {width for width, _ in rest} == {2}
    assert len(seen) == len(ways) * 2 * 12  # two lengths, in every repeat and the one that is not counted
    assert min(past for _, past in rest) >= 128
