"""Leaving out the top of the stack, as early exit does (LayerSkip, Elhoushi et al., arXiv 2404.16710)."""

from __future__ import annotations

from collections.abc import Iterator

from search.starts.start import Start, counts_of, skipping

_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)


def early_exits(num_layers: int) -> Iterator[Start]:
    """Skip sets of the top layers, ever more of them.

    The whole draft is then a part of the verification, which need not compute it again.

    Args:
        num_layers: Decoder layers of the model.
    """
    for count in counts_of(num_layers, _SHARES):
        kept = num_layers - count
        yield f"early exit: after {kept} of {num_layers} layers", skipping(range(2 * kept, 2 * num_layers), num_layers)
