"""A KV cache that captured passes can address: where they write and how far they read is on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from layerskip.errors import InvalidInputError
from layerskip.stack.kv_cache import KVCache


class GraphCache(KVCache):
    """Keys and values at addresses that stay, read in buckets of the context.

    Outside captured passes it is an ordinary cache. In one, new keys and values go to the positions in a tensor, and
    attention reads the whole bucket: a mask leaves out what lies behind the text.

    Args:
        num_layers: Number of decoder layers.
        capacity: Positions to allocate.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(num_layers, capacity)
        self._positions: Tensor | None = None
        self._bucket = 0

    @contextmanager
    def at(self, positions: Tensor, bucket: int) -> Iterator[None]:
        """For the enclosed pass, write at positions ``[n]`` on the device and read the first ``bucket`` ones."""
        self._positions, self._bucket = positions, bucket
        try:
            yield
        finally:
            self._positions = None

    def reserve(self, positions: int) -> None:
        """Captured passes have the buffers' addresses, so that nothing can grow.

        Raises:
            InvalidInputError: There is no room.
        """
        if self.length + positions > self.capacity:
            raise InvalidInputError(f"engine: {self.length + positions} positions exceed the cache of {self.capacity}")

    def _write(self, buffers: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        if self._positions is None:
            return super()._write(buffers, layer, new, end)
        buffer = buffers[layer]
        if buffer is None:
            buffer = buffers[layer] = self._allocate(new)
        buffer.index_copy_(2, self._positions, new)
        return buffer[:, :, : self._bucket]

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, because what the mask leaves out is still multiplied by 0, and 0 times whatever lay there may be NaN.
        return like.new_zeros((*like.shape[:2], self.capacity, like.shape[3]))
