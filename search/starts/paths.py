"""Skip sets by dynamic programming: the way up the stack that stays closest to the full model's hidden states.

CLaSp (Chen et al., arXiv 2505.24196) lets a table of layers × layers skipped keep, in each cell, the hidden states of
the best way there, judged by their cosine similarity with the full model's at the same boundary. KnapSpec (arXiv
2602.20217) tells attention and MLP sublayers apart by what they cost. Here the table is over the flat stack of
sublayers × cost left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from search.starts.start import Start, different, skipping

RunSublayer = Callable[[int, Tensor], Tensor]
"""Takes the index of a sublayer and hidden states before it, ``[b, n, hidden_size]``; gives those after it."""

_BUDGETS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
# Units of cost in an average sublayer: two tell an MLP from an attention of a third of its cost.
_RESOLUTION = 2


@dataclass(frozen=True)
class Path:
    """The best way found to some boundary.

    Args:
        skipped: Indices of the sublayers left out on the way.
        units: What they cost together.
        similarity: Cosine of the hidden states with the full model's, mean over positions.
    """

    skipped: tuple[int, ...]
    units: int
    similarity: float


def most_similar_paths(states: Tensor, run_sublayer: RunSublayer, costs: Sequence[float]) -> Iterator[Start]:
    """The most similar draft that saves at least a budget, for growing budgets.

    A few dozen positions are enough. Each is taken through the stack once for every unit of the largest budget, or
    a little less.

    Args:
        states: ``[2 * num_layers + 1, n, hidden_size]``, the full model's at every boundary.
        run_sublayer: Runs a sublayer on several versions of these ``n`` positions at once, with whatever past they
            attend to.
        costs: What each of the ``2 * num_layers`` sublayers costs, in stack order, each above 0 and all in one unit.
    """
    return different(_of_all_budgets(states, run_sublayer, quantized(costs)))


def _of_all_budgets(states: Tensor, run_sublayer: RunSublayer, units: Sequence[int]) -> Iterator[Start]:
    targets = {share: math.ceil(share * sum(units)) for share in _BUDGETS}
    # A way may overshoot its budget by less than one sublayer, and must keep something.
    most = min(max(targets.values()) + max(units), sum(units)) - 1
    paths = best_paths(states, run_sublayer, units, most=most)
    for share, target in targets.items():
        enough = [path for path in paths if target <= path.units < target + max(units)]
        if enough:
            best = max(enough, key=lambda path: path.similarity)
            source = f"dynamic programming: {share:.1%} of the cost, by cosine similarity"
            yield source, skipping(best.skipped, len(units) // 2)


def quantized(costs: Sequence[float]) -> list[int]:
    """Costs as whole numbers of units, at least 1 each and :data:`_RESOLUTION` on average."""
    unit = sum(costs) / len(costs) / _RESOLUTION
    return [max(round(cost / unit), 1) for cost in costs]


@torch.inference_mode()
def best_paths(states: Tensor, run_sublayer: RunSublayer, units: Sequence[int], *, most: int) -> list[Path]:
    """The best way found to the top of the stack for every cost left out, from 0 to ``most`` units.

    Args:
        states: As for :func:`most_similar_paths`.
        run_sublayer: Likewise.
        units: What each sublayer costs.
        most: Most units to leave out.

    Returns:
        Paths in ascending order of what they leave out; costs that no skip set sums up to are absent.
    """
    paths, x = [Path((), 0, 1.0)], states[:1]  # x: [paths, n, hidden_size]
    for index, after in enumerate(states[1:]):
        ways = torch.cat(
            [run_sublayer(index, x).to(x.device), x]
        )  # every path with the sublayer, then every path without it
        similarities = functional.cosine_similarity(ways.float(), after.float(), dim=-1).mean(-1).tolist()
        longer = [(path.skipped, path.units) for path in paths]
        longer += [((*path.skipped, index), path.units + units[index]) for path in paths]
        best: dict[int, int] = {}  # row in ``ways`` by cost left out
        for row, (_, cost) in enumerate(longer):
            if cost <= most and (cost not in best or similarities[row] > similarities[best[cost]]):
                best[cost] = row
        rows = [best[cost] for cost in sorted(best)]
        paths = [Path(*longer[row], similarities[row]) for row in rows]
        x = ways[rows]
    return paths
