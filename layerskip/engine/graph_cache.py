"""The cache of captured passes: keys and values at fixed addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerskip.kv_cache import KVCache
from layerskip.token_tree import numbers_on


@dataclass(frozen=True)
class FixedSlot:
    """Where a captured pass writes and reads the keys and values of a layer, in tensor operations alone.

    Args:
        keys: ``[1, heads, capacity, dim]``.
        values: Likewise.
        positions: ``[n]``, where the last ``n`` new ones go.
        bucket: How many are read.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    bucket: int

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`GraphCache.update`."""
        known = keys.shape[2] - len(self.positions)
        self.keys.index_copy_(2, self.positions, keys[:, :, known:])
        self.values.index_copy_(2, self.positions, values[:, :, known:])
        return self.keys[:, :, : self.bucket], self.values[:, :, : self.bucket]


class GraphCache(KVCache):
    """Keys and values at fixed addresses, read in buckets of the context.

    Outside captured passes it is an ordinary cache. In a captured pass, new keys and values go to the positions in a
    tensor, and attention reads the whole bucket: a mask excludes what comes after the text.

    Keys and values of all layers are parts of one tensor, so that the accepted path of a tree is kept in two kernels.

    Args:
        num_layers: Number of decoder layers.
        capacity: Positions to allocate.

    Attributes:
        moves: How often it has grown. Passes that were captured before know addresses that are no longer its.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(num_layers, capacity)
        self.moves = 0
        self._positions: Tensor | None = None
        self._bucket = self._known_rows = 0
        self._store: Tensor | None = None  # [2 * num_layers, heads, capacity, dim]
        self._stored = 0
        self._moved_together: tuple[Tensor, ...] | None = None  # looked for once, after the last allocation

    @contextmanager
    def at(self, positions: Tensor, bucket: int, *, known: int = 0) -> Iterator[None]:
        """For the enclosed pass, write at positions ``[n]`` on the device and read the first ``bucket`` ones.

        Args:
            positions: Of the pass.
            bucket: How many keys attention reads.
            known: How many of the first positions hold verified keys and values, which the pass writes in the slots
                after the model's layers alone; see :meth:`recompute_last`.
        """
        self._positions, self._bucket, self._known_rows = positions, bucket, known
        try:
            yield
        finally:
            self._positions = None

    def reserve(self, positions: int) -> None:
        if self.length + positions > self.capacity:
            self._store, self._stored = None, 0
            self.moves += 1
        super().reserve(positions)

    def compact(self, past: int, rows: Sequence[int]) -> None:
        kept, rows = len(rows), tuple(rows)
        if rows != tuple(range(kept)):
            if self._moved_together is None:
                self._moved_together = tuple(self._of_model())
            for buffer in self._moved_together:
                moved = buffer[..., past:, :].index_select(-2, numbers_on(rows, buffer.device))
                buffer[..., past : past + kept, :] = moved
        self.rollback(past + kept)

    def _of_model(self) -> Iterator[Tensor]:
        """What holds the keys and values of the model's layers, ``[..., positions, dim]``."""
        if self._store is not None:
            yield self._store
        for buffer in (*self._keys[: self._num_layers], *self._values[: self._num_layers]):
            if buffer is not None and buffer.untyped_storage().data_ptr() != self._store_address:
                yield buffer

    @property
    def _store_address(self) -> int:
        return 0 if self._store is None else self._store.untyped_storage().data_ptr()

    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        if self._positions is None:
            return super().update(keys, values, layer)
        for buffers, new in ((self._keys, keys), (self._values, values)):
            buffers.extend([None] * (layer + 1 - len(buffers)))
            if buffers[layer] is None:
                buffers[layer] = self._allocate(new)
        return self.slot(layer)(keys, values)

    def slot(self, layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        written = layer < len(self._keys)
        keys, values = (self._keys[layer], self._values[layer]) if written else (None, None)
        if self._positions is None or keys is None or values is None:
            return super().slot(layer)
        known = self._known_rows if layer < self._num_layers else 0
        return FixedSlot(keys, values, self._positions[known:], self._bucket)

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, because masked values are still multiplied by 0, and 0 times uninitialized memory may be NaN.
        self._moved_together = None
        shape = (*like.shape[1:2], self.capacity, like.shape[3])
        if self._store is None:
            self._store = like.new_zeros(2 * self._num_layers, *shape)
        if self._stored < len(self._store) and self._store.shape[1:] == shape:
            self._stored += 1
            return self._store[self._stored - 1 : self._stored]
        return like.new_zeros(1, *shape)
