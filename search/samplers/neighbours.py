"""Neighbours of a candidate: those that skip a few sublayers more or less."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from layerskip.drafting.config import DraftConfig
from layerskip.skip_set import SkipSet


def nearby(config: DraftConfig, order: Sequence[int]) -> Iterator[DraftConfig]:
    """A candidate, then those that differ from it in one sublayer, in two, and so on.

    Args:
        config: The candidate.
        order: Indices of the sublayers that may differ, those first that shall change first.
    """
    mask = config.skip_set.mask
    for count in range(len(order) + 1):
        for changed in itertools.combinations(order, count):
            flipped = [skip != (index in changed) for index, skip in enumerate(mask)]
            if not all(flipped):  # a draft must keep something
                yield replace(config, skip_set=SkipSet.from_mask(flipped))
