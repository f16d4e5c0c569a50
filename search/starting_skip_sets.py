"""Starting skip sets: families of skip sets that are worth trying before anything is learned from trials.

One family is found by dynamic programming. CLaSp (Chen et al., arXiv 2505.24196) keeps, in each cell of a table of
layers × layers skipped, the hidden states of the best path there, judged by their cosine similarity with the target
model's at the same boundary. KnapSpec (arXiv 2602.20217) tells attention and MLP sublayers apart by their costs. Here
the table is over the flat stack of sublayers × skipped cost.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor
from torch.nn import functional

from layerskip.skip_set import SkipSet

Start = tuple[str, SkipSet]


def different(starts: Iterable[Start]) -> Iterator[Start]:
    """Starts in their order, without those that skip what an earlier one skips.

    Args:
        starts: Of any number of families, one after the other.
    """
    seen = set()
    for source, skip_set in starts:
        if skip_set not in seen:
            seen.add(skip_set)
            yield source, skip_set


def counts_of(total: int, shares: Sequence[float]) -> list[int]:
    """The whole numbers nearest to shares of a total, each once; neither none nor all of it."""
    rounded = dict.fromkeys(round(share * total) for share in shares)
    return [count for count in rounded if 0 < count < total]


def nothing_skipped(num_layers: int) -> Iterator[Start]:
    """The empty skip set. With a draft vocabulary alone, it may already pay."""
    yield "nothing skipped", SkipSet(num_layers)


# (what to skip, share of the inner layers)
_STARTS = (
    ("attention", 1 / 4),
    ("attention", 1 / 2),
    ("mlp", 1 / 8),
    ("both", 1 / 8),
    ("both", 1 / 4),
)


def evenly_spaced(num_layers: int) -> Iterator[Start]:
    """Skip sets of growing size. The first and the last layer are kept: without them drafts fail.

    In a shallow model shares round to the same count, or to none, and there are fewer.

    Args:
        num_layers: Decoder layers of the model.
    """
    return (start for start in different(_of_all_shares(num_layers)) if len(start[1]))


def _of_all_shares(num_layers: int) -> Iterator[Start]:
    inner = range(1, num_layers - 1)
    for kind, share in _STARTS:
        count = round(share * len(inner))
        layers = tuple(inner[int((i + 0.5) * len(inner) / count)] for i in range(count))
        skip_set = SkipSet(
            num_layers,
            attention=layers if kind in ("attention", "both") else (),
            mlp=layers if kind in ("mlp", "both") else (),
        )
        yield f"evenly spaced: {kind}, {share:.1%} of the inner layers", skip_set


_EXIT_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)


def early_exits(num_layers: int) -> Iterator[Start]:
    """Skip sets of more and more of the top layers.

    The whole draft is then a part of the verification, which need not compute it again.

    Args:
        num_layers: Decoder layers of the model.
    """
    for count in counts_of(num_layers, _EXIT_SHARES):
        kept = num_layers - count
        yield f"early exit: after {kept} of {num_layers} layers", SkipSet.early_exit(num_layers, kept)


def published(num_layers: int) -> Iterator[Start]:
    """Published skip sets of any models with as many layers: depth is what they have in common.

    Args:
        num_layers: Decoder layers of the model.
    """
    text = (files("search") / "data" / "published_skip_sets.json").read_text(encoding="utf-8")
    for entry in json.loads(text):
        if entry["num_hidden_layers"] == num_layers:
            task = f" on {entry['task']}" if "task" in entry else ""
            skip_set = SkipSet(num_layers, tuple(entry["attention"]), tuple(entry["mlp"]))
            yield f"published for {entry['model']}{task}: {entry['source']}", skip_set


_CHANGE_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)


def block_influence(states: Tensor) -> list[float]:
    """How much each sublayer changes the hidden states: 1 − cosine before and after, mean over positions.

    Args:
        states: ``[2 * num_layers + 1, n, hidden_size]``, the target model's at every boundary, from
            :func:`layerskip.drafting.bridges.record_states`.

    Returns:
        One number from 0 to 2 for each of the ``2 * num_layers`` sublayers, in stack order.
    """
    # Boundary by boundary: recorded states may be gigabytes, and in a short type.
    changes = [
        1 - functional.cosine_similarity(before.float(), after.float(), dim=-1).mean()
        for before, after in itertools.pairwise(states)
    ]
    return torch.stack(changes).tolist()


def least_change(states: Tensor) -> Iterator[Start]:
    """Skip sets of growing size, each of the sublayers with the smallest :func:`block_influence`.

    Args:
        states: As for :func:`block_influence`.
    """
    influence = block_influence(states)
    ranked = sorted(range(len(influence)), key=influence.__getitem__)
    for count in counts_of(len(ranked), _CHANGE_SHARES):
        source = f"least change: {count} of {len(ranked)} sublayers, by cosine similarity"
        yield source, SkipSet.of_sublayers(ranked[:count], len(ranked) // 2)


_FEW = (1, 2, 4)
_DAMAGE_SHARES = (1 / 60, 1 / 30, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4)


def least_damage(acceptance: Callable[[SkipSet], float], costs: Sequence[float]) -> Iterator[Start]:
    """Skip sets of growing size, each of the sublayers with the smallest (−log α) ÷ cost.

    −log α adds up over sublayers as far as they do their damage independently of each other, and then these are the
    best skip sets of their size.

    Args:
        acceptance: The acceptance rate α of a draft, from 0 to 1; called once for each sublayer.
        costs: Cost of each of the ``2 * num_layers`` sublayers, in stack order, each above 0 and all in one unit.
    """
    ranked = _ranked(len(costs), acceptance, costs)
    for count in counts_of(len(ranked), _DAMAGE_SHARES):
        source = f"least damage: {count} of {len(ranked)} sublayers, by acceptance of each alone"
        yield source, SkipSet.of_sublayers(ranked[:count], len(costs) // 2)


def skipping_few(stop: int, acceptance: Callable[[SkipSet], float], costs: Sequence[float]) -> Iterator[Start]:
    """Skip sets of a few sublayers below an exit, those with the smallest (−log α) ÷ cost.

    Args:
        stop: Index of the first sublayer above the exit; the number of all sublayers without one.
        acceptance: As for :func:`least_damage`; called once for each sublayer below the exit.
        costs: Likewise.
    """
    ranked = _ranked(stop, acceptance, costs)
    for count in (few for few in _FEW if few < stop):
        yield (
            f"least damage: {count} of {stop} sublayers",
            SkipSet.of_sublayers(ranked[:count], len(costs) // 2),
        )


def _ranked(stop: int, acceptance: Callable[[SkipSet], float], costs: Sequence[float]) -> list[int]:
    """The sublayers before ``stop``, those first that do least damage for their cost."""
    damage = [_damage(acceptance(SkipSet.of_sublayers([index], len(costs) // 2))) for index in range(stop)]
    # Of several that do no damage at all, the most expensive first.
    return sorted(range(stop), key=lambda index: (damage[index] / costs[index], -costs[index]))


def _damage(acceptance: float) -> float:
    return -math.log(acceptance) if acceptance > 0 else math.inf


RunSublayer = Callable[[int, Tensor], Tensor]
"""Runs a sublayer by its index on hidden states, ``[b, n, hidden_size]``."""

_BUDGETS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
# Units of cost in an average sublayer: two tell an MLP from an attention of a third of its cost.
_RESOLUTION = 2


@dataclass(frozen=True)
class PartialSkipSet:
    """What the best path found to some boundary skips.

    Args:
        skipped: Indices of the sublayers.
        units: Their cost.
        similarity: Cosine of the hidden states with the target model's, mean over positions.
    """

    skipped: tuple[int, ...]
    units: int
    similarity: float


def most_similar_paths(states: Tensor, run_sublayer: RunSublayer, costs: Sequence[float]) -> Iterator[Start]:
    """The most similar draft that saves at least a budget, for growing budgets.

    A few dozen positions are enough. Each runs through the stack about once for every unit of the largest budget.

    Args:
        states: ``[2 * num_layers + 1, n, hidden_size]``, the target model's at every boundary.
        run_sublayer: Runs a sublayer on several versions of these ``n`` positions at once.
        costs: Cost of each of the ``2 * num_layers`` sublayers, in stack order, each above 0 and all in one unit.
    """
    return different(_of_all_budgets(states, run_sublayer, quantized(costs)))


def _of_all_budgets(states: Tensor, run_sublayer: RunSublayer, units: Sequence[int]) -> Iterator[Start]:
    targets = {share: math.ceil(share * sum(units)) for share in _BUDGETS}
    # A path may overshoot its budget by less than one sublayer, and must keep something.
    most = min(max(targets.values()) + max(units), sum(units)) - 1
    paths = best_paths(states, run_sublayer, units, most=most)
    for share, target in targets.items():
        enough = [path for path in paths if target <= path.units < target + max(units)]
        if enough:
            best = max(enough, key=lambda path: path.similarity)
            source = f"dynamic programming: {share:.1%} of the cost, by cosine similarity"
            yield source, SkipSet.of_sublayers(best.skipped, len(units) // 2)


def quantized(costs: Sequence[float]) -> list[int]:
    """Costs as whole numbers of units, at least 1 each and :data:`_RESOLUTION` on average."""
    unit = sum(costs) / len(costs) / _RESOLUTION
    return [max(round(cost / unit), 1) for cost in costs]


@torch.inference_mode()
def best_paths(states: Tensor, run_sublayer: RunSublayer, units: Sequence[int], *, most: int) -> list[PartialSkipSet]:
    """The best path found to the top of the stack for every skipped cost, from 0 to ``most`` units.

    Args:
        states: As for :func:`most_similar_paths`.
        run_sublayer: Likewise.
        units: Cost of each sublayer.
        most: Most units to skip.

    Returns:
        Paths in ascending order of their skipped cost; costs that no skip set sums up to are absent.
    """
    paths, x = [PartialSkipSet((), 0, 1.0)], states[:1]  # x: [paths, n, hidden_size]
    for index, after in enumerate(states[1:]):
        # Every path with the sublayer, then every path without it.
        versions = torch.cat([run_sublayer(index, x).to(x.device), x])
        similarities = functional.cosine_similarity(versions.float(), after.float(), dim=-1).mean(-1).tolist()
        longer = [(path.skipped, path.units) for path in paths]
        longer += [((*path.skipped, index), path.units + units[index]) for path in paths]
        best: dict[int, int] = {}  # row in ``versions`` by skipped cost
        for row, (_, cost) in enumerate(longer):
            if cost <= most and (cost not in best or similarities[row] > similarities[best[cost]]):
                best[cost] = row
        rows = [best[cost] for cost in sorted(best)]
        paths = [PartialSkipSet(*longer[row], similarities[row]) for row in rows]
        x = versions[rows]
    return paths
