"""Which shape a branching draft should have, from how often each of its tokens would be the text's next.

A draft is a chain with leaves beside it. A token at some depth and rank adds to a round as often as the chain above it
stands and the target model's choice has that rank there. The best shape of a size takes the tokens that add most.

Sources: Medusa (arXiv 2401.10774, section 2.3.3) and Sequoia (arXiv 2402.12374) build fixed trees from measured
acceptance in this way; the confidence threshold, which ends a chain earlier, makes ours depend on the text too, as
SWIFT's (arXiv 2410.06916) and EAGLE-2's (arXiv 2406.16858) do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from layerskip.drafting.config import DraftConfig
from layerskip.drafting.stopping import ConfidenceThreshold, DraftStopping, FixedLength
from search.acceptance import LAST_RANK, Trace
from search.space import SearchSpace

_DEPTHS = (1, 2, 3, 4, 6)
_CONFIDENCES = (0.2, 0.4, 0.6)


def gains(traces: Sequence[Trace], depth: int) -> np.ndarray:
    """How often a token adds to a round: ``[depth, LAST_RANK]``, by depth and rank, over all places of all texts."""
    found = np.zeros((depth, LAST_RANK))
    places = sum(len(trace.ranks) for trace in traces)
    for trace in traces:
        reached = np.ones(len(trace.ranks), dtype=bool)  # from which places the chain stands so far
        for level in range(min(depth, len(trace.ranks))):
            there = trace.ranks[level:][reached[: len(trace.ranks) - level]]
            found[level] += np.bincount(there[there < LAST_RANK], minlength=LAST_RANK)
            reached = reached[: len(trace.ranks) - level] & (trace.ranks[level:] == 0)
    return found / max(places, 1)


def best_comb(gain: np.ndarray, size: int) -> tuple[int, ...]:
    """The chain with leaves of a size that adds most to a round.

    Args:
        gain: ``[depth, ranks]``, as :func:`gains` gives it.
        size: Tokens, at least ``depth``.

    Returns:
        Tokens at each depth.
    """
    widths = np.ones(len(gain), dtype=int)
    for _ in range(size - len(gain)):
        # Better ranks are proposed first, whether or not they add more.
        adds = [row[width] if width < gain.shape[1] else -1.0 for row, width in zip(gain, widths, strict=True)]
        widths[int(np.argmax(adds))] += 1
    return tuple(widths.tolist())


def branching_policies(config: DraftConfig, traces: Sequence[Trace], space: SearchSpace) -> Iterator[DraftConfig]:
    """Drafts that branch, of each size in the space, in the shapes that suit a candidate.

    Args:
        config: The candidate.
        traces: The candidate's.
        space: Gives sizes and gates.
    """
    deepest = gains(traces, max(_DEPTHS))
    for depth in (depth for depth in _DEPTHS if depth <= space.max_draft_length):
        exits: list[DraftStopping] = [FixedLength(depth)]
        if depth > 1:
            exits += [ConfidenceThreshold(confidence, depth) for confidence in _CONFIDENCES]
        for size in (size for size in space.tree_sizes if size > depth):
            branches = best_comb(deepest[:depth], size)
            for rule, threshold in product(exits, space.target_confidence_thresholds):
                yield replace(config, stopping=rule, target_confidence_threshold=threshold, tree=branches)
