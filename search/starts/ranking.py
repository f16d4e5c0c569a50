"""Leaving out the sublayers that do least damage for what they save, each tried alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from layerskip.stack.skipset import SkipSet
from search.starts.start import Start, counts_of, skipping

_FEW = (1, 2, 4)
_SHARES = (1 / 60, 1 / 30, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4)


def least_damage(acceptance: Callable[[SkipSet], float], costs: Sequence[float]) -> Iterator[Start]:
    """Skip sets of growing size, each of the sublayers with the smallest (−log α) ÷ cost.

    −log α adds up over sublayers as far as they do their damage independently of each other, and then these are the
    best skip sets of their size.

    Args:
        acceptance: The acceptance rate α of a draft, from 0 to 1; asked once for each sublayer.
        costs: What each of the ``2 * num_layers`` sublayers costs, in stack order, each above 0 and all in one unit.
    """
    ranked = _ranked(len(costs), acceptance, costs)
    for count in counts_of(len(ranked), _SHARES):
        source = f"least damage: {count} of {len(ranked)} sublayers, by acceptance of each alone"
        yield source, skipping(ranked[:count], len(costs) // 2)


def skipping_below(stop: int, acceptance: Callable[[SkipSet], float], costs: Sequence[float]) -> Iterator[Start]:
    """Skip sets of a few sublayers below an exit, those with the smallest (−log α) ÷ cost.

    Args:
        stop: Index of the first sublayer above the exit.
        acceptance: As for :func:`least_damage`; asked once for each sublayer below the exit.
        costs: Likewise.
    """
    ranked = _ranked(stop, acceptance, costs)
    for count in (few for few in _FEW if few < stop):
        yield f"least damage: {count} of {stop} sublayers below its exit", skipping(ranked[:count], len(costs) // 2)


def _ranked(stop: int, acceptance: Callable[[SkipSet], float], costs: Sequence[float]) -> list[int]:
    """The sublayers before ``stop``, those first that do least damage for their cost."""
    damage = [_damage(acceptance(skipping([index], len(costs) // 2))) for index in range(stop)]
    # Of several that do no damage at all, the dearest first.
    return sorted(range(stop), key=lambda index: (damage[index] / costs[index], -costs[index]))


def _damage(acceptance: float) -> float:
    return -math.log(acceptance) if acceptance > 0 else math.inf
