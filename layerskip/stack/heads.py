"""The weights by which a head scores some tokens, whatever the head is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerskip.stack.sublayers import weights_of

# Unit vectors put through the head at a time: keeps [vectors, vocab_size] small.
_CHUNK = 256


@torch.no_grad()
def head_rows(head: nn.Module, token_ids: Tensor, like: Tensor) -> Tensor:
    """The weights by which a head without bias scores some tokens.

    A quantized head, or one with an adapter, has no such rows to take: what it answers to unit vectors are its weights.

    Args:
        head: The head.
        token_ids: ``[n]``.
        like: ``[..., hidden_size]``, hidden states of the model's dtype.

    Returns:
        ``[n, hidden_size]``, on the head's device.
    """
    device = next(weights_of(head)).device
    token_ids = token_ids.to(device)
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter:
        return head.weight[token_ids]
    units = torch.eye(like.shape[-1], dtype=like.dtype, device=device)
    return torch.cat([head(some)[:, token_ids].T for some in units.split(_CHUNK)], dim=1)
