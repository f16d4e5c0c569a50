"""Which past positions each new position may attend to, in the form that the model's attention function takes.

transformers derives masks and positions from layer 0's cache entry. That breaks when attention 0 is skipped and when
layers' lengths differ while drafting, so they are computed here from the cache's one length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerskip.errors import UnsupportedModelError

SUPPORTED_ATTENTION = ("eager", "sdpa")


def check_attention_implementation(name: str | None) -> str:
    """Return the name of a supported attention implementation.

    Raises:
        UnsupportedModelError: Masks for this implementation are not known here.
    """
    if name not in SUPPORTED_ATTENTION:
        raise UnsupportedModelError(
            f"attention implementation '{name}' is not supported; load the model with "
            f"attn_implementation={' or '.join(repr(n) for n in SUPPORTED_ATTENTION)}"
        )
    return name


def attention_mask(
    past: int, width: int, *, window: int | None, implementation: str, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Mask for ``width`` new positions behind ``past`` known ones.

    Args:
        past: Number of positions already in the cache.
        width: Number of new positions.
        window: A position sees itself and the ``window - 1`` positions before it; None sees all.
        implementation: ``"eager"`` (additive mask) or ``"sdpa"`` (boolean mask, true where attention is allowed).
        dtype: The hidden states' dtype, for an additive mask.
        device: Where to build the mask.

    Returns:
        ``[1, 1, width, past + width]``, or None where the attention function needs no mask.
    """
    total = past + width
    everything_in_window = window is None or total <= window
    # One new position sees all the others; sdpa without a mask is causal over a text that starts here.
    if everything_in_window and (width == 1 or (past == 0 and implementation == "sdpa")):
        return None
    positions = torch.arange(past, total, device=device)
    return mask_at(positions, total, window=window, implementation=implementation, dtype=dtype)


def mask_at(positions: Tensor, length: int, *, window: int | None, implementation: str, dtype: torch.dtype) -> Tensor:
    """Mask for new positions that may be anywhere, over the first ``length`` keys of the cache.

    Args:
        positions: ``[width]``, the new positions.
        length: Number of keys, those behind the new positions included.
        window: As in :func:`attention_mask`.
        implementation: As in :func:`attention_mask`.
        dtype: As in :func:`attention_mask`.

    Returns:
        ``[1, 1, width, length]``.
    """
    query = positions[:, None]  # [width, 1]
    key = torch.arange(length, device=positions.device)[None, :]  # [1, length]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    return _as_mask(allowed[None, None], implementation, dtype)


def tree_mask(
    slots: Tensor,
    positions: Tensor,
    ancestors: Tensor,
    length: int,
    *,
    window: int | None,
    implementation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Mask for a tree: each row sees the text, and of the tree the rows that it comes from.

    Args:
        slots: ``[n]``, where in the cache the rows are, one behind the other.
        positions: ``[n]``, their positions in the text, which siblings share.
        ancestors: ``[n, n]``, which rows each comes from, itself included.
        length: Number of keys, those behind the tree included.
        window: As in :func:`attention_mask`.
        implementation: As in :func:`attention_mask`.
        dtype: As in :func:`attention_mask`.

    Returns:
        ``[1, 1, n, length]``.
    """
    key = torch.arange(length, device=slots.device)
    allowed = (key < slots[0]).expand(len(slots), -1).index_copy(1, slots, ancestors)  # [n, length]
    if window is not None:
        allowed &= key.index_copy(0, slots, positions) > positions[:, None] - window
    return _as_mask(allowed[None, None], implementation, dtype)


def teacher_mask(
    positions: Tensor, length: int, *, window: int | None, implementation: str, dtype: torch.dtype
) -> Tensor:
    """Mask for a teacher-forced pass: known keys of the positions before, and of the new keys the position's own.

    Args:
        positions: ``[b, q]``, the new positions in each of ``b`` texts.
        length: Number of known keys; the ``q`` new ones lie behind them.
        window: As in :func:`attention_mask`.
        implementation: As in :func:`attention_mask`.
        dtype: As in :func:`attention_mask`.

    Returns:
        ``[b, 1, q, length + q]``.
    """
    query = positions[:, None, :, None]  # [b, 1, q, 1]
    key = torch.arange(length, device=positions.device)
    known = key < query
    if window is not None:
        known &= key > query - window
    own = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device).expand(len(positions), 1, -1, -1)
    return _as_mask(torch.cat([known, own], dim=-1), implementation, dtype)


def _as_mask(allowed: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    if implementation == "sdpa":
        return allowed
    nothing = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return nothing.masked_fill_(~allowed, torch.finfo(dtype).min)
