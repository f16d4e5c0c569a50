"""Simulation, compared with real generations and with a plain loop that runs the real stopping rules."""

import math
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, LayerSkipModel, PromptLookup, SkipSet, generate
from layerskip.costs import DraftParts
from layerskip.drafting.controller import Controller
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import EagerEngine
from layerskip.target_texts import batch_generate
from search.acceptance_tracer import AcceptanceTracer
from search.reference import record
from search.simulate import RoundCosts, Simulator
from search.space import SearchSpace
from search.traces import LAST_RANK, LookupTrace
from tests.models import LAYERS, tiny_llama
from tests.search.searches import known_costs, random_prompts
from tests.search.traces import stack_trace
from tests.strategies import branches, draft_exits, fractions, skip_sets, tokens

LONGEST, MOST = 9, 25
LOOKUP = PromptLookup(1, 6)
COPYING, DRAFTING = 0, 1


def policy_of(stopping, threshold=0.0, tree=(), prompt_lookup=None):
    """A configuration with this policy."""
    return DraftConfig(SkipSet(LAYERS), False, None, 0, stopping, threshold, tree, prompt_lookup)


policies = st.builds(
    policy_of, draft_exits(), st.just(0.0) | fractions, st.just(()) | branches(), st.sampled_from([None, LOOKUP])
)


@st.composite
def traces(draw, limit):
    """Any trace of at most ``limit`` tokens; shorter ones ended by themselves."""
    tokens = draw(st.integers(1, limit))
    asked = {"min_size": tokens - 1, "max_size": tokens - 1}
    ranks = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 5, LAST_RANK]), **asked))
    confidence, target = (draw(st.lists(fractions, **asked)) for _ in range(2))
    return stack_trace(ranks, confidence, target, draw(st.integers(1, 9)))


@st.composite
def simulations(draw):
    """Traces, what each step of a draft costs on each text, what rounds cost, and most new tokens."""
    limit = draw(st.integers(1, 14))
    drawn = draw(st.lists(traces(limit), min_size=1, max_size=5))
    seconds = st.floats(0.01, 10)
    texts = len(drawn)
    prefill, step = (np.array(draw(st.lists(seconds, min_size=texts, max_size=texts))) for _ in range(2))
    chains, trees = np.random.default_rng(draw(st.integers(0, 99))).uniform(0.01, 10, (2, texts, MOST + 1))
    return drawn, step, stack_costs(prefill, step, chains, trees), limit


def stack_costs(prefill, step, chains, trees):
    return RoundCosts(prefill, lambda ways: len(ways) * step, chains, trees)


def copied_along(trace):
    """Some copies along a text, always the same for the same text, none of which is accepted past its end."""
    source = np.random.default_rng(trace.new_tokens * 10 + trace.prompt_length)
    shape = (trace.new_tokens, LONGEST + 1)
    copied = source.integers(0, 4, shape) * source.integers(0, 2, shape)
    left = trace.new_tokens - 1 - np.arange(trace.new_tokens)[:, None] - np.arange(LONGEST + 1)
    return LookupTrace(copied, np.clip(np.minimum(copied, source.integers(0, 4, shape)), 0, np.maximum(left, 0)))


def simulated(texts, tried, costs, limit, *, controlled=False):
    lookups = {LOOKUP: [copied_along(trace) for trace in texts]}
    return Simulator(texts, costs, limit, lookups, controlled).simulate(tried)


def in_a_loop(trace, policy, row, step, costs, limit, controllers=None):
    """Seconds, drafted and accepted tokens of one text under one policy, round by round."""
    state, unsure, at = policy.stopping.new_state(), False, 0
    seconds, drafted, accepted = costs.prefill[row], 0, 0
    copies = copied_along(trace) if policy.prompt_lookup else None

    def allowed(source, wanted):
        return controllers[source].limit(wanted) if controllers else wanted

    def learn(source, gain, proposed, accepted):
        if controllers and proposed:
            controllers[source].observe(gain, proposed=proposed, accepted=accepted)
        elif controllers:
            controllers[source].rest()

    while at < trace.new_tokens - 1:
        copied = min(copies.copied[at, 0], allowed(COPYING, limit - (at + 1) - 1)) if copies else 0
        if copied > 0:
            taken = min(copied, copies.accepted[at, 0])
            seconds += costs.trees[row, copied]
            unsure = unsure_after(trace, at + taken, policy)
            drafted, accepted, at = drafted + copied, accepted + taken, at + taken + 1
            alone = (costs.trees if policy.tree else costs.chains)[row, 0]
            gain = taken - (costs.trees[row, copied] - alone) / costs.chains[row, 0]
            learn(COPYING, gain, copied, taken)
            learn(DRAFTING, 0, 0, 0)
            continue
        proposed, most = 0, allowed(DRAFTING, limit - (at + 1) - 1)
        while proposed < min(most, state.max_length) and not unsure:
            asked = at + proposed
            proposed += 1
            if state.stops_after(trace.confidence[0, asked] if asked < len(trace.agrees) else 1.0):
                break
        taken = 0
        while taken < proposed and at + taken < len(trace.agrees) and trace.agrees[at + taken]:
            taken += 1
        widths = [*policy.tree, *[1] * proposed][:proposed]
        tail = 0
        if copies and proposed:
            room = min(limit - (at + 1) - 1 - proposed, LOOKUP.length - sum(widths))
            tail = min(copies.copied[at, proposed], allowed(COPYING, max(room, 0)))
        verified = costs.trees if policy.tree or tail else costs.chains
        seconds += proposed * step[row] + verified[row, sum(widths) + tail]
        on_the_main_path = taken == proposed
        if taken < proposed and at + taken < len(trace.agrees):
            taken += trace.ranks[0, at + taken] < widths[taken]
        if proposed:
            state.observe(proposed, taken)
        alone = (costs.trees if policy.tree else costs.chains)[row, sum(widths)]
        learn(DRAFTING, taken + 1 - (proposed * step[row] + alone) / costs.chains[row, 0], proposed, taken)
        right = min(tail, copies.accepted[at, proposed]) if on_the_main_path and tail else 0
        learn(COPYING, right - (verified[row, sum(widths) + tail] - alone) / costs.chains[row, 0], tail, right)
        taken += right
        proposed += tail
        end = at + taken
        unsure = unsure_after(trace, end, policy)
        drafted, accepted, at = drafted + proposed, accepted + taken, end + 1
    return seconds, drafted, accepted


def unsure_after(trace, place, policy):
    return (trace.target_confidence[place] if place < len(trace.agrees) else 1.0) < policy.target_confidence_threshold


@given(simulations(), policies, st.booleans())
@settings(max_examples=300)
def test_it_does_what_a_loop_with_the_real_stopping_rules_and_controllers_does(drawn, policy, controlled):
    texts, step, costs, limit = drawn
    controllers = [(Controller(), Controller()) if controlled else None for _ in texts]

    def decode(row):
        return in_a_loop(texts[row], policy, row, step, costs, limit, controllers[row])

    rounds = [decode(row) for row in range(len(texts))]
    if controlled:  # they have seen the text before
        controllers = controllers[-1:] + controllers[:-1]
        for controller in chain.from_iterable(controllers):
            controller.start()
        rounds = [decode(row) for row in range(len(texts))]
    plain = [costs.prefill[row] + (trace.new_tokens - 1) * costs.chains[row, 0] for row, trace in enumerate(texts)]
    [found] = simulated(texts, [policy], costs, limit, controlled=controlled)
    drafted, accepted = sum(d for _, d, _ in rounds), sum(a for _, _, a in rounds)
    assert found.config == policy
    assert math.isclose(found.speedup, sum(plain) / sum(seconds for seconds, _, _ in rounds))
    assert found.acceptance_rate == (accepted / drafted if drafted else None)
    np.testing.assert_allclose(found.seconds, [seconds for seconds, _, _ in rounds])


@given(simulations(), st.lists(policies, min_size=1, max_size=6))
@settings(max_examples=60)
def test_policies_do_not_disturb_each_other(drawn, tried):
    texts, _, costs, limit = drawn
    together = simulated(texts, tried, costs, limit)
    alone = [simulated(texts, [policy], costs, limit)[0] for policy in tried]
    assert [found.config for found in together] == tried
    assert [found.acceptance_rate for found in together] == [found.acceptance_rate for found in alone]
    np.testing.assert_allclose([found.seconds for found in together], [found.seconds for found in alone])


@given(simulations(), policies)
@settings(max_examples=40)
def test_the_order_of_texts_does_not_matter(drawn, policy):
    texts, step, costs, limit = drawn
    backwards = stack_costs(costs.prefill[::-1], step[::-1], costs.chains[::-1], costs.trees[::-1])
    one, other = (simulated(t, [policy], c, limit)[0] for t, c in ((texts, costs), (texts[::-1], backwards)))
    assert math.isclose(one.speedup, other.speedup)
    assert one.acceptance_rate == other.acceptance_rate


def counted(model, prompt, drafter, limit):
    stats = generate(model, prompt, drafter=drafter, max_new_tokens=limit).stats
    return stats.drafted, stats.accepted


def predicted(model, stack, prompts, policy, limit):
    """Drafted and accepted tokens of each prompt, by simulation: read off what they cost."""
    written = batch_generate(model, prompts, limit)
    texts = [record(model, prompt, new) for prompt, new in zip(prompts, written, strict=True)]
    found = []
    for trace in (trace for part in AcceptanceTracer(model, texts).trace(stack) for trace in part):
        nothing = np.zeros((1, MOST + 1))
        seconds = stack_costs(
            np.ones(1), np.ones(1), nothing, nothing
        )  # one for the prompt, and one for each draft step
        [simulated] = Simulator([trace], seconds, limit).simulate([policy])
        drafted = round(simulated.seconds[0]) - 1
        found.append((drafted, round(drafted * simulated.acceptance_rate) if drafted else 0))
    return found


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
    stack, known = model.stack_of(skip_set), known_costs()
    traces = [stack_trace([0] * 4, [1.0] * 4, [1.0] * 4, length) for length in (3, 30)]
    costs = RoundCosts.of_stack(known, stack, engine, traces, 2)
    for row, context in enumerate([5.5, 32.5]):
        there = known.at(context)
        assert costs.prefill[row] == known.at(traces[row].prompt_length).prefill
        assert costs.drafting([1, 1])[row] == 2 * there.draft_step(DraftParts(3, 3))
        assert list(costs.chains[row]) == list(costs.trees[row]) == [there.verification(k + 1) for k in range(3)]
    engine.costs = known.short.passes  # with costs, an engine resumes where that pays
    chosen = RoundCosts.of_stack(known, stack, engine, traces, 2)
    plain, *drafted = (known.at(5.5).verification(n) for n in (1, 2, 3))
    assert list(chosen.trees[0]) == [plain, *drafted]
    assert chosen.chains[0, 0] == plain  # nothing was drafted, so there is nothing to resume from
    assert all(0 < found < whole for found, whole in zip(chosen.chains[0, 1:], drafted, strict=True))


@given(simulations())
@settings(max_examples=40)
def test_a_whole_space_of_policies_can_be_simulated(drawn):
    texts, _, costs, limit = drawn
    space = SearchSpace(LAYERS, max_draft_length=LONGEST, target_confidence_thresholds=(0.0, 0.5))
    tried = space.policies(policy_of(FixedLength()))
    found = simulated(texts, tried, costs, limit)
    assert [one.config for one in found] == tried
    assert all(one.speedup > 0 for one in found)
