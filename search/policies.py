"""Policies: when and how much a draft proposes, chosen by simulation.

A token tree is grown token by token: each new token is the one that texts run through most often. Sources: Medusa
(arXiv 2401.10774, section 2.3.3) and Sequoia (arXiv 2402.12374). The confidence threshold, which ends a draft earlier,
makes its tree depend on the text too, as in SWIFT (arXiv 2410.06916) and EAGLE-2 (arXiv 2406.16858).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import islice, product

import numpy as np
from numpy.typing import NDArray

from layerskip.drafting.config import DraftConfig
from layerskip.drafting.stopping import ConfidenceThreshold, DraftStopping, FixedLength
from layerskip.token_tree import branches_of
from search.simulate import SimulatedSpeedup, Simulator
from search.space import CONFIDENCES, SearchSpace
from search.traces import LAST_RANK, Trace

_DEPTHS = (1, 2, 3, 4, 6)
# Standard errors by which prompt lookup has to save time.
_CLEAR = 2.0
# Policies that prompt lookup is tried with, the fastest without it: what copies continue may be shorter.
_TRIED_WITH_LOOKUP = 6

Path = tuple[int, ...]
"""Where a token of a tree is: its own rank and those of the tokens before it."""


class PolicyChoice:
    """Chooses the policy with which a draft is simulated to be fastest.

    Prompt lookup is added where it clearly saves time: a few texts that repeat themselves gain so much by it that they
    decide the sum. So it has to save time over the texts one by one, by a few standard errors.

    Args:
        config: The draft, but for its policy.
        space: The policies to try.
        simulator: Simulates the draft.
        heads: Whether draft heads draft. Of their trees, tokens may follow any token of a place; of those of the stack,
            only the first.
    """

    def __init__(self, config: DraftConfig, space: SearchSpace, simulator: Simulator, *, heads: bool = False) -> None:
        self._space = space
        self._simulator = simulator
        trees = tree_policies(config, space, simulator.traces, heads=heads)
        self._simulated = simulator.simulate([*space.policies(config), *trees])
        self._seconds = np.array([simulated.seconds for simulated in self._simulated])  # [policies, n]
        self._with_lookups: dict[int, list[SimulatedSpeedup]] = {}

    def best(self) -> SimulatedSpeedup:
        """The fastest policy over all texts; its speedup is optimistic, for the texts chose it."""
        return self._fastest_on(np.ones(self._seconds.shape[1], dtype=bool))

    def expected_speedup(self) -> float:
        """The speedup to expect of a policy that is chosen like this on texts that had no part in choosing it.

        Leave-one-out cross-validation: each text is decoded with the policy that is fastest on all others. With a
        single text there are no others, and it is the speedup of :meth:`best`.
        """
        best, num_texts = self.best(), self._seconds.shape[1]
        if num_texts == 1:
            return best.speedup
        chosen = [self._fastest_on(np.arange(num_texts) != text) for text in range(num_texts)]
        seconds = sum(policy.seconds[text] for text, policy in enumerate(chosen))
        return best.speedup * sum(best.seconds) / seconds

    def _fastest_on(self, texts: NDArray[np.bool_]) -> SimulatedSpeedup:
        rows = self._seconds[:, texts].sum(axis=1).argsort(kind="stable")[:_TRIED_WITH_LOOKUP].tolist()
        best = self._simulated[rows[0]]
        clear = [faster for faster in self._lookups(rows) if _clearly_faster(faster, best, texts)]
        return min(clear, key=lambda simulated: np.array(simulated.seconds)[texts].sum(), default=best)

    def _lookups(self, rows: Sequence[int]) -> list[SimulatedSpeedup]:
        """Some policies, each with each setting of prompt lookup."""
        new = [row for row in rows if row not in self._with_lookups]
        settings = self._space.prompt_lookups
        configs = [replace(self._simulated[row].config, prompt_lookup=lookup) for row in new for lookup in settings]
        simulated = iter(self._simulator.simulate(configs) if configs else ())
        self._with_lookups |= {row: list(islice(simulated, len(settings))) for row in new}
        return [policy for row in rows for policy in self._with_lookups[row]]


def _clearly_faster(simulated: SimulatedSpeedup, other: SimulatedSpeedup, texts: NDArray[np.bool_]) -> bool:
    saved = 1 - np.divide(simulated.seconds, other.seconds)[texts]
    error = saved.std(ddof=1) / math.sqrt(len(saved)) if len(saved) > 1 else 0.0
    return bool(saved.mean() > _CLEAR * error)


def tree_policies(
    config: DraftConfig, space: SearchSpace, traces: Sequence[Trace], *, heads: bool
) -> Iterator[DraftConfig]:
    """A draft with every policy with a tree that simulation tries.

    Args:
        config: The draft, but for its policy.
        space: Gives the sizes of trees, the longest draft and target-confidence thresholds.
        traces: The draft's, which decide the shapes of the trees.
        heads: As in :class:`PolicyChoice`.
    """
    depths = [depth for depth in _DEPTHS if depth <= space.max_draft_length]
    taken = count_paths(traces, max(depths)) if space.tree_sizes else Counter()
    for depth in depths:
        thresholds = CONFIDENCES if depth > 1 else ()
        rules: list[DraftStopping] = [FixedLength(depth)]
        rules += [ConfidenceThreshold(threshold, depth) for threshold in thresholds]
        trees = [best_tree(taken, depth, size, heads=heads) for size in space.tree_sizes if size > depth]
        for tree, rule, threshold in product(trees, rules, space.target_confidence_thresholds):
            yield replace(config, stopping=rule, target_confidence_threshold=threshold, tree=tree)


def count_paths(traces: Sequence[Trace], depth: int) -> Counter[Path]:
    """How often texts run through each path: from how many new tokens the target's choices have these ranks."""
    taken: Counter[Path] = Counter()
    for trace in traces:
        positions = trace.new_tokens - 1
        for newest in range(positions):
            path: Path = ()
            for place in range(min(depth, trace.places, positions - newest)):
                rank = int(trace.ranks[place, newest + place])
                if rank == LAST_RANK:
                    break
                path = (*path, rank)
                taken[path] += 1
    return taken


def best_tree(taken: Mapping[Path, int], depth: int, size: int, *, heads: bool) -> tuple[int | tuple[int, ...], ...]:
    """The tree of a size that texts run through most often, with a path of some depth through the first tokens.

    More probable tokens are proposed first, whether or not texts run through them more often.

    Args:
        taken: How often texts run through paths, from :func:`count_paths`.
        depth: Places.
        size: Tokens, at least ``depth``.
        heads: As in :class:`PolicyChoice`.

    Returns:
        Its branches, as in :class:`layerskip.DraftConfig`.
    """
    tree = {(0,) * length for length in range(1, depth + 1)}
    candidates = {(*path[:-1], 1) for path in tree}
    while len(tree) < size:
        best = max(candidates, key=lambda path: (taken.get(path, 0), [-len(path), *(-rank for rank in path)]))
        tree.add(best)
        candidates = candidates - {best} | {(*best[:-1], best[-1] + 1)}
        if heads and len(best) < depth:
            candidates.add((*best, 0))
    return branches_of(_widths(tree, depth))


def _widths(tree: Set[Path], depth: int) -> Iterator[list[int]]:
    """How many tokens follow each token of the place before, place by place."""
    before: list[Path] = [()]
    for length in range(1, depth + 1):
        here = sorted(path for path in tree if len(path) == length)
        children = Counter(path[:-1] for path in here)
        yield [children[path] for path in before]
        before = here
