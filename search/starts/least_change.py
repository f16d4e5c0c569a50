"""Leaving out the sublayers that change the hidden states least.

The block influence of ShortGPT (Men et al., arXiv 2403.03853), of each sublayer instead of each layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from search.starts.start import Start, counts_of, skipping

_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)


def block_influence(states: Tensor) -> list[float]:
    """How much each sublayer changes the hidden states: 1 − cosine before and after, mean over positions.

    Args:
        states: ``[2 * num_layers + 1, n, hidden_size]``, the full model's at every boundary, from
            :func:`layerskip.drafts.bridges.record_states`.

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
    for count in counts_of(len(ranked), _SHARES):
        source = f"least change: {count} of {len(ranked)} sublayers, by cosine similarity"
        yield source, skipping(ranked[:count], len(ranked) // 2)
