"""Policies: the shapes of trees, against a search through all shapes and against drafting itself; and the best one."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.target_texts import batch_generate
from layerskip.token_tree import TokenTree, widths_of
from search.acceptance_tracer import AcceptanceTracer
from search.policies import PolicyChoice, best_tree, count_paths, tree_policies
from search.reference import record
from search.simulate import RoundCosts, Simulator
from search.space import SearchSpace
from search.traces import LAST_RANK, LookupTrace
from tests.models import LAYERS
from tests.search.traces import head_trace, stack_trace

HEADS = 3
CONFIG = DraftConfig(SkipSet(4))


def grown(tree):
    return TokenTree.grown(widths_of(tree))


def test_texts_run_through_a_token_where_they_run_through_the_chain_above_it():
    taken = count_paths([stack_trace([0, 0, 1, 2]), stack_trace([1])], 2)
    assert {path: count for path, count in taken.items() if len(path) == 1} == {(0,): 2, (1,): 2, (2,): 1}
    assert (taken[0, 0], taken[0, 1], taken[0, 2]) == (1, 1, 0)


def test_texts_run_through_nothing_that_no_tree_reaches():
    assert count_paths([stack_trace([LAST_RANK] * 4)], 3) == {}
    assert count_paths([stack_trace([])], 3) == {}


@given(
    st.integers(1, 3).flatmap(
        lambda depth: st.lists(st.lists(st.integers(0, 20), min_size=5, max_size=5), min_size=depth, max_size=depth)
    ),
    st.integers(0, 5),
)
@settings(max_examples=60)
def test_no_tree_of_a_chain_with_leaves_has_more_where_better_ranks_have_more(counts, more):
    gain = [sorted(row, reverse=True) for row in counts]
    taken = {(0,) * place + (rank,): count for place, row in enumerate(gain) for rank, count in enumerate(row)}
    depth = len(gain)
    best = best_tree(taken, depth, depth + more, heads=False)
    assert sum(best) == depth + more

    def added(widths):
        return sum(sum(row[:width]) for row, width in zip(gain, widths, strict=True))

    shapes = itertools.product(range(1, more + 2), repeat=depth)
    assert added(best) == max(added(shape) for shape in shapes if sum(shape) == depth + more)


def test_the_paths_say_how_often_a_tree_is_accepted(tiny):
    """Drafts of one place: as often as texts run through its tokens, over the places that decoding drafts at."""
    config = DraftConfig(SkipSet(LAYERS, (1,), (2,)), stopping=FixedLength(1), tree=(6,))
    prompts = [[first, 7, 5] for first in range(6)]
    texts = [record(tiny, p, new) for p, new in zip(prompts, batch_generate(tiny, prompts, 16), strict=True)]
    parts = AcceptanceTracer(tiny, texts).trace(tiny.stack_of(config.skip_set))
    traces = [trace for part in parts for trace in part]
    drafter = LayerSkipDrafter(tiny, config)
    stats = [generate(tiny, p, drafter=drafter, max_new_tokens=16, eos_token_ids=[]).stats for p in prompts]
    found = sum(one.accepted for one in stats) / sum(one.drafted for one in stats)
    assert 0 < found < 1
    taken, places = count_paths(traces, 1), sum(trace.new_tokens - 1 for trace in traces)
    assert found == pytest.approx(sum(taken[(rank,)] for rank in range(6)) / places, abs=0.15)


def test_a_tree_of_heads_has_the_tokens_that_texts_run_through_most():
    # By place, from each token: the text runs 0-0, 0-1, 1-2 and 1-2, then 1-0, 3 and 2.
    taken = count_paths([head_trace([0, 0, 1, 1, 1, 3, 2], [0, 1, 2, 2, 0, LAST_RANK])], 2)

    def tree(depth, size):
        return best_tree(taken, depth, size, heads=True)

    assert tree(1, 2) == (2,)
    assert tree(2, 2) == (1, 1)
    assert tree(2, 3) == (2, 1)
    # Of equal tokens the shallower come first; after 1 the text never continues with 1, and so not with 2.
    assert tree(2, 6) == (4, 2)
    assert tree(2, 7) == (4, (2, 1))


@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * HEADS), min_size=1, max_size=30),
    st.integers(1, HEADS),
    st.integers(0, 20),
    st.booleans(),
)
def test_a_tree_has_its_size_and_depth(paths, depth, more, heads):
    trace = head_trace(*[[path[place] for path in paths][: len(paths) - place] for place in range(HEADS)])
    tree = best_tree(count_paths([trace], depth), depth, depth + more, heads=heads)
    assert (len(grown(tree).parents), grown(tree).depth) == (depth + more, depth)
    if not heads:
        assert all(isinstance(place, int) for place in tree)


@pytest.mark.parametrize("heads", [False, True])
def test_every_size_is_tried_at_every_depth_and_target_confidence_threshold(heads):
    space = SearchSpace(4, max_draft_length=2, target_confidence_thresholds=(0.0, 0.5), tree_sizes=(3, 7))
    policies = list(tree_policies(CONFIG, space, [head_trace([0, 1, 0, 3], [0, 2, 1])], heads=heads))
    found = {(len(grown(p.tree).parents), grown(p.tree).depth, p.target_confidence_threshold) for p in policies}
    assert found == set(itertools.product((3, 7), (1, 2), (0.0, 0.5)))
    assert {p.stopping.new_state().max_length for p in policies} == {1, 2}
    assert len(set(policies)) == len(policies)


def test_a_space_without_trees_has_none():
    assert not list(tree_policies(CONFIG, SearchSpace(4), [stack_trace([0, 1])], heads=False))


def flat_costs(texts):
    """Drafting a place costs half of a pass, and passes of every width the same."""
    passes = np.ones((texts, 25))
    return RoundCosts(np.ones(texts), lambda ways: np.full(texts, 0.5 * len(ways)), passes, passes)


@pytest.mark.parametrize(("ranks", "longest"), [([0] * 20, True), ([LAST_RANK] * 20, False)])
def test_the_best_policy_is_the_fastest_of_all(ranks, longest):
    """Drafts that are always right, then drafts that are never right."""
    space = SearchSpace(4, target_confidence_thresholds=(0.0, 0.9), tree_sizes=(3,))
    simulator = Simulator([stack_trace(ranks, target=[0.5] * 20)], flat_costs(1), 21)
    best = PolicyChoice(CONFIG, space, simulator).best()
    tried = [*space.policies(CONFIG), *tree_policies(CONFIG, space, simulator.traces, heads=False)]
    assert best.config in tried
    assert best.speedup == max(one.speedup for one in simulator.simulate(tried))
    assert (best.config.target_confidence_threshold == 0.0) == longest
    assert (best.speedup > 1) == longest


@given(st.lists(st.lists(st.sampled_from([0, LAST_RANK]), min_size=20, max_size=20), min_size=2, max_size=4))
@settings(max_examples=30, deadline=None)
def test_the_expected_speedup_of_each_text_is_that_of_the_policy_which_is_best_on_all_others(ranks):
    space, texts = SearchSpace(4), [stack_trace(row) for row in ranks]
    choice = PolicyChoice(CONFIG, space, Simulator(texts, flat_costs(len(texts)), 21))
    seconds = 0.0
    for number, text in enumerate(texts):
        others = texts[:number] + texts[number + 1 :]
        policy = PolicyChoice(CONFIG, space, Simulator(others, flat_costs(len(others)), 21)).best().config
        [alone] = Simulator([text], flat_costs(1), 21).simulate([policy])
        seconds += alone.seconds[0]
    assert choice.expected_speedup() == pytest.approx(21 * len(texts) / seconds)
    assert choice.expected_speedup() <= choice.best().speedup * (1 + 1e-9)


def test_with_a_single_text_the_expected_speedup_is_that_of_the_best_policy():
    choice = PolicyChoice(CONFIG, SearchSpace(4), Simulator([stack_trace([0] * 20)], flat_costs(1), 21))
    assert choice.expected_speedup() == choice.best().speedup


TOKENS = 41
SPACE = SearchSpace(4, target_confidence_thresholds=(0.0, 0.9), prompt_lookup=True)


def best_with(copies):
    """The best policy for a draft that is never right, on texts of which prompt lookup copies this.

    Args:
        copies: By text, what it copies with each setting: tokens after each new token, and how many are right.
    """
    wrong = stack_trace([LAST_RANK] * (TOKENS - 1), target=[0.5] * (TOKENS - 1))
    lookups = {lookup: [LookupTrace(*text(lookup)) for text in copies] for lookup in SPACE.prompt_lookups}
    # A tree takes a little longer than a token alone.
    trees = np.array([[1.0] + [1.1] * 24] * len(copies))
    costs = RoundCosts(np.ones(len(copies)), lambda ways: np.full(len(copies), 0.5 * len(ways)), trees, trees)
    return PolicyChoice(CONFIG, SPACE, Simulator([wrong] * len(copies), costs, TOKENS, lookups)).best().config


def copying(places, drafted, right):
    """The same copies after the first so many tokens, whatever the setting."""
    where = (np.arange(TOKENS) < places)[:, None] * np.ones(9, dtype=int)
    return lambda lookup: (where * drafted, where * right)


@pytest.mark.parametrize(
    ("copies", "pays"),
    [
        ([copying(places, 3, 3) for places in (8, 9, 7, 8)], True),
        ([copying(TOKENS - 4, 3, 3), *[copying(TOKENS, 3, 0)] * 3], False),  # one text that repeats itself
        ([copying(0, 0, 0)] * 4, False),
        ([copying(TOKENS, 3, 0)] * 4, False),
    ],
    ids=["all gain", "one gains", "nothing is copied", "all lose"],
)
def test_prompt_lookup_is_added_where_it_saves_time_over_the_texts_one_by_one(copies, pays):
    found = best_with(copies)
    assert (found.prompt_lookup is not None) == pays
    assert replace(found, prompt_lookup=None) == best_with([copying(0, 0, 0)] * 4)


def test_of_prompt_lookups_that_pay_the_fastest_is_added():
    found = best_with([lambda lookup, n=n: copying(9 + n, lookup.length, lookup.length)(lookup) for n in range(4)])
    assert found.prompt_lookup.length == max(lookup.length for lookup in SPACE.prompt_lookups)


def test_prompt_lookup_is_part_of_a_policy_only_where_the_space_has_it():
    wrong = [stack_trace([LAST_RANK] * 20)] * 2
    lookups = SearchSpace(4, prompt_lookup=True).prompt_lookups
    right = np.minimum(3, 20 - np.arange(21))[:, None] * np.ones(9, dtype=int)
    copied = {lookup: [LookupTrace(np.full((21, 9), 3), right)] * 2 for lookup in lookups}
    simulator = Simulator(wrong, flat_costs(2), 21, copied)
    for has_lookup in (True, False):
        best = PolicyChoice(CONFIG, SearchSpace(4, prompt_lookup=has_lookup), simulator).best()
        assert (best.config.prompt_lookup is not None) == has_lookup


def test_lookups_are_all_different():
    counted = Counter(SearchSpace(4, prompt_lookup=True).prompt_lookups)
    assert set(counted.values()) == {1}
