"""What every family of starts gives: skip sets, each with where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from layerskip.stack.skipset import SkipSet

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


def skipping(sublayers: Iterable[int], num_layers: int) -> SkipSet:
    """The skip set that leaves out sublayers by their index in the stack."""
    skipped = set(sublayers)
    return SkipSet.from_mask([index in skipped for index in range(2 * num_layers)])
