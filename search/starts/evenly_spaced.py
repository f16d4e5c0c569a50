"""Evenly spaced skip sets of growing size (SWIFT, arXiv 2410.06916, starts from such ones)."""

from __future__ import annotations

from collections.abc import Iterator

from layerskip.stack.skipset import SkipSet
from search.starts.start import Start, different

# (what to leave out, share of the inner layers)
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
