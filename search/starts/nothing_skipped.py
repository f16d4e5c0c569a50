"""The draft that is the full model: what all that skips is held against."""

from __future__ import annotations

from collections.abc import Iterator

from layerskip.stack.skipset import SkipSet
from search.starts.start import Start


def nothing_skipped(num_layers: int) -> Iterator[Start]:
    """The empty skip set. With a draft vocabulary alone, it may already pay."""
    yield "nothing skipped", SkipSet(num_layers)
