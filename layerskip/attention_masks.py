"""Attention masks: which positions each new position may attend to, in the form of the model's attention function.

transformers derives masks and positions from layer 0's cache entry. That breaks when attention 0 is skipped and when
layers' lengths differ while drafting, so they are computed here from the cache's one length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from layerskip.errors import UnsupportedModelError

SUPPORTED_ATTENTION = ("eager", "sdpa")


def needed_attention(config: PreTrainedConfig) -> dict[str, str]:
    """How a model has to be loaded: some versions of transformers choose sdpa, which leaves soft-capping out."""
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}


def check_attention_implementation(config: PreTrainedConfig) -> str:
    """Return the name of a model's attention implementation.

    Raises:
        UnsupportedModelError: Masks for this implementation are not known here, or it leaves out what the model needs.
    """
    name: str | None = config._attn_implementation
    if name == "sdpa" and needed_attention(config):
        raise UnsupportedModelError(
            "attention implementation 'sdpa' leaves out this model's soft-capping of attention scores (some versions "
            "of transformers say nothing); load the model with attn_implementation='eager'"
        )
    if name not in SUPPORTED_ATTENTION:
        raise UnsupportedModelError(
            f"attention implementation '{name}' is not supported; load the model with "
            f"attn_implementation={' or '.join(repr(n) for n in SUPPORTED_ATTENTION)}"
        )
    return name


@dataclass(frozen=True)
class AttentionMasks:
    """Makes a pass's masks, one for each sliding window that the model's layers have.

    Masks are additive: 0 where attention is allowed, the lowest number elsewhere. sdpa takes boolean ones, too, but
    makes additive ones of them anew in every layer.

    Args:
        windows: In positions: a position sees itself and the ``window - 1`` positions before it; None sees all.
        implementation: ``"eager"`` or ``"sdpa"``, which needs fewer masks.
        dtype: The hidden states' dtype.
    """

    windows: Collection[int | None]
    implementation: str
    dtype: torch.dtype

    def causal(self, past: int, width: int, device: torch.device) -> dict[int | None, Tensor | None]:
        """For ``width`` new positions after ``past`` known ones.

        Returns:
            ``[1, 1, width, past + width]``, or None where the attention function needs no mask.
        """
        total = past + width
        # One new position sees all the others; sdpa without a mask is causal over a text that starts here.
        simple = width == 1 or (past == 0 and self.implementation == "sdpa")
        unneeded = {window for window in self.windows if simple and (window is None or total <= window)}
        if len(unneeded) == len(self.windows):
            return dict.fromkeys(unneeded)
        masks = self.at(torch.arange(past, total, device=device), total)
        return {window: None if window in unneeded else mask for window, mask in masks.items()}

    def at(self, positions: Tensor, length: int) -> dict[int | None, Tensor | None]:
        """For new positions anywhere, over the first ``length`` keys of the cache.

        Args:
            positions: ``[width]``, the new positions.
            length: Number of keys, including those after the new positions.

        Returns:
            ``[1, 1, width, length]``.
        """
        query = positions[:, None]  # [width, 1]
        key = torch.arange(length, device=positions.device)[None, :]  # [1, length]
        return self._each(lambda window: _within(key, query, window, key <= query)[None, None])

    def tree(self, slots: Tensor, positions: Tensor, ancestors: Tensor, length: int) -> dict[int | None, Tensor | None]:
        """For a tree: each row sees the text, and of the tree its ancestors.

        Args:
            slots: ``[n]``, the consecutive places of the rows in the cache.
            positions: ``[n]``, their positions in the text, which siblings share.
            ancestors: ``[n, n]``, the ancestors of each row, itself included.
            length: Number of keys, including those after the tree.

        Returns:
            ``[1, 1, n, length]``.
        """
        key = torch.arange(length, device=slots.device)
        allowed = (key < slots[0]).expand(len(slots), -1).index_copy(1, slots, ancestors)  # [n, length]
        key_positions = key.index_copy(0, slots, positions)
        return self._each(lambda window: _within(key_positions, positions[:, None], window, allowed)[None, None])

    def teacher(self, positions: Tensor, length: int) -> dict[int | None, Tensor | None]:
        """For a teacher-forced pass: known keys of the positions before, and of the new keys the position's own.

        Args:
            positions: ``[b, q]``, the new positions in each of ``b`` texts.
            length: Number of known keys; the ``q`` new ones come after them.

        Returns:
            ``[b, 1, q, length + q]``.
        """
        query = positions[:, None, :, None]  # [b, 1, q, 1]
        key = torch.arange(length, device=positions.device)
        own = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
        own = own.expand(len(positions), 1, -1, -1)
        return self._each(lambda window: torch.cat([_within(key, query, window, key < query), own], dim=-1))

    def _each(self, allowed: Callable[[int | None], Tensor]) -> dict[int | None, Tensor | None]:
        return {window: self._as_mask(allowed(window)) for window in self.windows}

    def _as_mask(self, allowed: Tensor) -> Tensor:
        nothing = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
        return nothing.masked_fill_(~allowed, torch.finfo(self.dtype).min)


def _within(key: Tensor, query: Tensor, window: int | None, allowed: Tensor) -> Tensor:
    """Of the allowed keys, those inside the window of each query position."""
    return allowed if window is None else allowed & (key > query - window)
