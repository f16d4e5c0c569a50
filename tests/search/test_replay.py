"""Replay, held against real generations and against a plain loop with the real exit states."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.costs import DraftParts
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.prompt_lookup import PromptLookup
from layerskip.engine import EagerEngine
from layerskip.target_texts import batch_generate
from search.acceptance import LAST_RANK, AcceptanceTracer, Trace
from search.copying import Copies
from search.reference import record
from search.replay import RoundCosts, SimulatedSpeedup, replay
from search.space import SearchSpace
from tests.models import LAYERS, tiny_llama
from tests.search.searches import known_costs, random_prompts
from tests.strategies import branches, draft_exits, fractions, skip_sets, tokens

LONGEST, MOST = 9, 25
NGRAMS = PromptLookup(1, 2, 3)


def policy_of(stopping, threshold=0.0, tree=(), prompt_lookup=None):
    """A configuration with this policy."""
    return DraftConfig(SkipSet(LAYERS), False, None, 0, stopping, threshold, tree, prompt_lookup)


policies = st.builds(
    policy_of, draft_exits(), st.just(0.0) | fractions, st.just(()) | branches(), st.sampled_from([None, NGRAMS])
)


@st.composite
def traces(draw, limit):
    """Any trace of at most ``limit`` tokens; shorter ones ended by themselves."""
    tokens = draw(st.integers(1, limit))
    asked = {"min_size": tokens - 1, "max_size": tokens - 1}
    ranks = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 5, LAST_RANK]), **asked))
    confidence, target = (draw(st.lists(fractions, **asked)) for _ in range(2))
    return Trace(np.array(ranks, int), np.array(confidence), np.array(target), draw(st.integers(1, 9)), tokens)


@st.composite
def replays(draw):
    limit = draw(st.integers(1, 14))
    drawn = draw(st.lists(traces(limit), min_size=1, max_size=5))
    seconds = st.floats(0.01, 10)
    texts = len(drawn)
    costs = RoundCosts(
        np.array(draw(st.lists(seconds, min_size=texts, max_size=texts))),
        np.array(draw(st.lists(seconds, min_size=texts, max_size=texts))),
        *(np.random.default_rng(draw(st.integers(0, 99))).uniform(0.01, 10, (2, texts, MOST + 1))),
    )
    return drawn, costs, limit


def copied_along(trace):
    """Some copies along a text, always the same for the same text, none of which stands behind its end."""
    source = np.random.default_rng(trace.new_tokens * 10 + trace.prompt_length)
    drafted = source.integers(0, 4, trace.new_tokens)
    left = trace.new_tokens - 1 - np.arange(trace.new_tokens)
    return Copies(drafted, np.minimum(np.minimum(drafted, source.integers(0, 4, trace.new_tokens)), left))


def replayed(texts, tried, costs, limit):
    return replay(texts, tried, costs, limit=limit, copies={NGRAMS: [copied_along(trace) for trace in texts]})


def played(trace, policy, row, costs, limit):
    """Seconds, drafted and accepted tokens of one text under one policy, round by round."""
    state, unsure, at = policy.stopping.new_state(), False, 0
    seconds, drafted, accepted = costs.prefill[row], 0, 0
    copies = copied_along(trace) if policy.prompt_lookup else None
    while at < trace.new_tokens - 1:
        copied = min(copies.drafted[at], limit - (at + 1) - 1) if copies else 0
        if copied > 0:
            stands = min(copied, copies.stand[at])
            seconds += costs.trees[row, copied]
            unsure = unsure_behind(trace, at + stands, policy)
            drafted, accepted, at = drafted + copied, accepted + stands, at + stands + 1
            continue
        proposed = 0
        while proposed < min(limit - (at + 1) - 1, state.max_length) and not unsure:
            asked = at + proposed
            proposed += 1
            if state.stops_after(trace.confidence[asked] if asked < len(trace.agrees) else 1.0):
                break
        stands = 0
        while stands < proposed and at + stands < len(trace.agrees) and trace.agrees[at + stands]:
            stands += 1
        widths = [*policy.tree, *[1] * proposed][:proposed]
        verified = costs.trees if policy.tree else costs.verification
        seconds += proposed * costs.step[row] + verified[row, sum(widths)]
        if stands < proposed and at + stands < len(trace.ranks):
            stands += trace.ranks[at + stands] < widths[stands]
        if proposed:
            state.observe(proposed, stands)
        end = at + stands
        unsure = unsure_behind(trace, end, policy)
        drafted, accepted, at = drafted + proposed, accepted + stands, end + 1
    return seconds, drafted, accepted


def unsure_behind(trace, place, policy):
    return (trace.target_confidence[place] if place < len(trace.agrees) else 1.0) < policy.target_confidence_threshold


@given(replays(), policies)
@settings(max_examples=300)
def test_replay_does_what_a_loop_with_the_real_controller_does(drawn, policy):
    texts, costs, limit = drawn
    rounds = [played(trace, policy, row, costs, limit) for row, trace in enumerate(texts)]
    plain = [
        costs.prefill[row] + (trace.new_tokens - 1) * costs.verification[row, 0] for row, trace in enumerate(texts)
    ]
    found = replayed(texts, [policy], costs, limit)
    drafted, accepted = sum(d for _, d, _ in rounds), sum(a for _, _, a in rounds)
    assert found.config == policy
    assert math.isclose(found.speedup, sum(plain) / sum(seconds for seconds, _, _ in rounds))
    assert found.acceptance_rate == (accepted / drafted if drafted else None)
    np.testing.assert_allclose(found.seconds, [seconds for seconds, _, _ in rounds])


@given(replays(), st.lists(policies, min_size=1, max_size=6))
@settings(max_examples=60)
def test_the_best_of_all_policies_is_found_and_they_do_not_disturb_each_other(drawn, tried):
    texts, costs, limit = drawn
    alone = [replayed(texts, [policy], costs, limit) for policy in tried]
    best = replayed(texts, tried, costs, limit)
    assert math.isclose(best.speedup, max(one.speedup for one in alone))
    assert best.config in tried
    [same] = {one for one, policy in zip(alone, tried, strict=True) if policy == best.config}
    assert math.isclose(best.speedup, same.speedup)
    assert (best.acceptance_rate, best.seconds) == (same.acceptance_rate, same.seconds)
    assert replayed(texts, tried, costs, limit) == best


@given(replays(), policies)
@settings(max_examples=40)
def test_the_order_of_texts_does_not_matter(drawn, policy):
    texts, costs, limit = drawn
    backwards = RoundCosts(costs.prefill[::-1], costs.step[::-1], costs.verification[::-1], costs.trees[::-1])
    one, other = (replayed(t, [policy], c, limit) for t, c in ((texts, costs), (texts[::-1], backwards)))
    assert math.isclose(one.speedup, other.speedup)
    assert one.acceptance_rate == other.acceptance_rate


def counted(model, prompt, drafter, limit):
    stats = generate(model, prompt, drafter=drafter, max_new_tokens=limit).stats
    return stats.drafted, stats.accepted


def predicted(model, stack, prompts, policy, limit):
    """Drafted and accepted tokens of each prompt, by replay."""
    written = batch_generate(model, prompts, limit)
    texts = [record(model, prompt, new) for prompt, new in zip(prompts, written, strict=True)]
    traces = [trace for part in AcceptanceTracer(model, texts).traces(stack) for trace in part]
    found = []
    for trace in traces:
        costs = RoundCosts.of(known_costs(), stack, EagerEngine(model), [trace], MOST)
        drafts = _Counted(trace, policy, costs, limit)
        found.append((drafts.drafted, drafts.accepted))
    return found


class _Counted:
    """The number of drafted and accepted tokens that replay finds, read off what it says they cost."""

    def __init__(self, trace, policy, costs, limit):
        rate = replay([trace], [policy], costs, limit=limit).acceptance_rate
        nothing = np.zeros_like(costs.verification)
        step = RoundCosts(
            np.ones(1), np.ones(1), nothing, nothing
        )  # a second for the prompt, and one for each draft step
        one = replay([trace], [policy], step, limit=limit)
        self.drafted = round(1 / one.speedup) - 1
        self.accepted = round(self.drafted * rate) if self.drafted else 0


@given(
    prompts=st.lists(tokens(9), min_size=1, max_size=3),
    skip_set=skip_sets(),
    gate=st.just(0.0) | fractions,
    limit=st.integers(1, 9),
    widths=st.just(()) | branches(),
)
@settings(max_examples=40)
def test_drafts_of_one_token_come_out_as_in_real_decoding(tiny, prompts, skip_set, gate, limit, widths):
    policy = policy_of(FixedLength(1), gate, widths)
    drafter = LayerSkipDrafter(tiny, replace(policy, skip_set=skip_set))
    real = [counted(tiny, prompt, drafter, limit) for prompt in prompts]
    assert predicted(tiny, tiny.stack_of(skip_set), prompts, policy, limit) == real


@given(prompt=tokens(9), policy=policies, limit=st.integers(1, 12))
@settings(max_examples=25)
def test_a_draft_that_skips_nothing_comes_out_as_in_real_decoding(tiny, prompt, policy, limit):
    policy = replace(policy, prompt_lookup=None)
    nothing = policy.skip_set
    drafter = LayerSkipDrafter(tiny, policy)
    assert predicted(tiny, tiny.stack_of(nothing), [prompt], policy, limit) == [counted(tiny, prompt, drafter, limit)]


@pytest.mark.parametrize("length", [1, 3, 8])
def test_a_text_that_ends_by_itself_comes_out_as_in_real_decoding(length):
    hf_model = tiny_llama()
    model = LayerSkipModel(hf_model)
    prompts = [list(prompt.tokens) for prompt in random_prompts(search=4).search]
    ends = [new[4] for new in batch_generate(model, prompts, 5)]
    hf_model.generation_config.eos_token_id = ends
    policy, nothing = policy_of(FixedLength(length)), SkipSet(LAYERS)
    drafter = LayerSkipDrafter(model, policy)
    real = [counted(model, prompt, drafter, 20) for prompt in prompts]
    assert predicted(model, model.stack_of(nothing), prompts, policy, 20) == real


def test_costs_are_those_of_each_text_and_of_the_way_the_engine_verifies():
    model = LayerSkipModel(tiny_llama())
    engine = EagerEngine(model)
    skip_set = SkipSet(LAYERS, attention=(2,), mlp=(3,))  # the first half is shared
    stack, latency = model.stack_of(skip_set), known_costs()
    traces = [Trace(np.zeros(4, int), np.ones(4), np.ones(4), length, 5) for length in (3, 30)]
    costs = RoundCosts.of(latency, stack, engine, traces, 2)
    for row, context in enumerate([5.5, 32.5]):
        there = latency.at(context)
        assert costs.prefill[row] == latency.at(traces[row].prompt_length).prefill
        assert costs.step[row] == there.draft_step(DraftParts(3, 3))
        assert list(costs.verification[row]) == [there.verification(k + 1) for k in range(3)]
    engine.costs = latency.short.passes  # with costs, an engine resumes where that pays
    chosen = RoundCosts.of(latency, stack, engine, traces, 2)
    plain, *drafted = (latency.at(5.5).verification(n) for n in (1, 2, 3))
    assert chosen.verification[0, 0] == plain  # nothing was drafted, so there is nothing to resume from
    assert all(0 < found < whole for found, whole in zip(chosen.verification[0, 1:], drafted, strict=True))


@given(replays())
@settings(max_examples=40)
def test_a_whole_space_of_policies_can_be_replayed(drawn):
    texts, costs, limit = drawn
    space = SearchSpace(LAYERS, max_draft_length=LONGEST, target_confidence_thresholds=(0.0, 0.5))
    found = replay(texts, space.policies(policy_of(FixedLength())), costs, limit=limit)
    assert isinstance(found, SimulatedSpeedup)
    assert found.speedup > 0
    assert replace(found, config=found.config) == found
