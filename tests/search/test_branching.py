"""The shape of drafts that branch, against a search through all shapes and against drafting itself."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.target_texts import batch_generate
from search.acceptance import LAST_RANK, AcceptanceTracer, Trace
from search.branching import best_comb, branching_policies, gains
from search.reference import record
from search.space import SearchSpace
from tests.models import LAYERS


def trace(ranks):
    return Trace(np.array(ranks, int), np.ones(len(ranks)), np.ones(len(ranks)), 3, len(ranks) + 1)


def added(gain, widths):
    return sum(row[:width].sum() for row, width in zip(gain, widths, strict=True))


def test_a_token_adds_where_the_chain_above_it_stands():
    found = gains([trace([0, 0, 1, 2]), trace([1])], 2)
    assert found[0, :3].tolist() == [0.4, 0.4, 0.2]  # of five places, two agree
    assert found[1, :3].tolist() == [0.2, 0.2, 0.0]  # behind the two that agree come another, and one of rank 1
    assert found[:, 3:].sum() == 0


def test_what_no_branch_reaches_adds_nothing():
    assert gains([trace([LAST_RANK] * 4)], 3).sum() == 0
    assert gains([trace([])], 3).sum() == 0


@given(
    st.integers(1, 3).flatmap(
        lambda depth: st.lists(st.lists(st.integers(0, 20), min_size=5, max_size=5), min_size=depth, max_size=depth)
    ),
    st.integers(0, 5),
)
@settings(max_examples=60)
def test_no_shape_of_the_size_adds_more_where_better_ranks_add_more(counts, more):
    gain = np.array([sorted(row, reverse=True) for row in counts], float)
    size = len(gain) + more
    best = best_comb(gain, size)
    assert sum(best) == size
    shapes = itertools.product(range(1, more + 2), repeat=len(gain))
    assert added(gain, best) == max(added(gain, shape) for shape in shapes if sum(shape) == size)


def test_the_gains_say_how_often_a_branch_stands(tiny):
    """Drafts of one place: as often as the gains of its tokens add up to, over the places that decoding drafts at."""
    stack, widths = tiny.stack_of(SkipSet(LAYERS, (1,), (2,))), (6,)
    prompts = [[first, 7, 5] for first in range(6)]
    texts = [record(tiny, p, new) for p, new in zip(prompts, batch_generate(tiny, prompts, 16), strict=True)]
    traces = [trace for part in AcceptanceTracer(tiny, texts).traces(stack) for trace in part]
    drafter = LayerSkipDrafter(tiny, DraftConfig(SkipSet(LAYERS, (1,), (2,)), stopping=FixedLength(1), tree=widths))
    stats = [generate(tiny, p, drafter=drafter, max_new_tokens=16, eos_token_ids=[]).stats for p in prompts]
    found = sum(one.accepted for one in stats) / sum(one.drafted for one in stats)
    assert 0 < found < 1
    assert found == pytest.approx(gains(traces, 1)[0, :6].sum(), abs=0.15)


def test_every_size_is_tried_at_every_depth_and_gate():
    space = SearchSpace(4, max_draft_length=2, target_confidence_thresholds=(0.0, 0.5), tree_sizes=(3, 7))
    policies = list(branching_policies(DraftConfig(SkipSet(4)), [trace([0, 1, 0, 3, 0])], space))
    assert {(sum(p.tree), len(p.tree), p.target_confidence_threshold) for p in policies} == set(
        itertools.product((3, 7), (1, 2), (0.0, 0.5))
    )
    assert len(set(policies)) == len(policies)


def test_a_space_without_trees_has_none():
    assert not list(branching_policies(DraftConfig(SkipSet(4)), [trace([0, 1])], SearchSpace(4)))
