"""Keys and values of the text so far, shared by draft and target model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

# What transformers calls a model's cache: the one from 5.24 on, the other before.
CACHE_NAMES = ("cache", "past_key_values")


class KVCache:
    """Preallocated keys and values for every layer, rolled back by moving a length.

    Draft and target model write into the same cache. A pass writes its new keys and values after ``length`` and then
    moves ``length`` forward; rolling back moves it back, and whatever comes after it is overwritten by a later pass. A
    draft leaves gaps in the layers that it skips. They come after the length it is rolled back to, so verification
    fills them before anything reads them.

    Attention modules get this object as their cache and call :meth:`update`. The target model never writes to
    the slots after those of its layers: they belong to the draft's own layers.

    Args:
        num_layers: Number of decoder layers; further slots are added when first written.
        capacity: Positions to allocate when a layer is first written. The cache grows when a pass needs more.

    Attributes:
        length: Positions that it holds.
        capacity: Positions that it has room for.
        uses: How often an engine has handed it out, emptied. Whoever got it before has lost its content.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self.uses = 0
        # Allocated at the first write, which knows the layer's device, dtype and head shape: [1, heads, capacity, dim].
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._num_layers = num_layers
        self._verified = 0  # positions whose keys and values in the model's layers are not written again

    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        """Write the new positions of one layer; return all its positions, old and new.

        Args:
            keys: ``[1, heads, n, dim]``, the keys of the ``n`` positions after ``length``.
            values: Likewise.
            layer: The layer's index, or that of a slot after the model's layers.
            _: What attention modules were called with besides, which transformers passes on from 5.24 on.

        Returns:
            Keys and values, each a view of shape ``[1, heads, length + n, dim]``.
        """
        for buffers in (self._keys, self._values):
            buffers.extend([None] * (layer + 1 - len(buffers)))
        end = self.length + keys.shape[2]
        return (
            self._write(self._keys, layer, keys, end),
            self._write(self._values, layer, values, end),
        )

    def slot(self, layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The :meth:`update` of one layer."""
        return partial(self.update, layer=layer)

    def _write(self, buffers: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        buffer = buffers[layer]
        if buffer is None:
            buffer = buffers[layer] = self._allocate(new)
        known = max(self._verified - self.length, 0) if layer < self._num_layers else 0
        buffer[:, :, self.length + known : end] = new[:, :, known:]
        return buffer[:, :, :end]

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_empty((*like.shape[:2], self.capacity, like.shape[3]))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that was written, each ``[1, heads, length, dim]``."""
        keys, values = self._keys[index], self._values[index]
        if keys is None or values is None:
            raise ValueError(f"layer {index} was never written")
        return keys[:, :, : self.length], values[:, :, : self.length]

    def written(self) -> Iterator[Tensor]:
        """Keys and values of the layers that were written, each ``[1, heads, length, dim]``."""
        for buffer in (*self._keys, *self._values):
            if buffer is not None:
                yield buffer[:, :, : self.length]

    def reserve(self, positions: int) -> None:
        """Make room for this many positions after ``length``, at least doubling the capacity when it must grow."""
        needed = self.length + positions
        if needed <= self.capacity:
            return
        self.capacity = max(needed, 2 * self.capacity)
        for first, last in ((0, self._num_layers), (self._num_layers, None)):  # the model's layers together
            for buffers in (self._keys, self._values):
                part = buffers[first:last]
                buffers[first:last] = [None if buffer is None else self._grown(buffer) for buffer in part]

    def _grown(self, buffer: Tensor) -> Tensor:
        grown = self._allocate(buffer)
        # All of it: after the length there may be what a draft has computed and verification will build on.
        grown[:, :, : buffer.shape[2]] = buffer
        return grown

    def advance(self, positions: int) -> None:
        """Count the positions that a pass has written in every layer it ran."""
        self.length += positions

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on.

        Raises:
            ValueError: ``length`` is negative or ahead of the current length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to length {length}: the cache holds {self.length} positions")
        self.length = length

    def compact(self, past: int, rows: Sequence[int]) -> None:
        """Keep some of the positions after ``past``, moved together, and forget the others.

        Args:
            past: Positions that stay as they are.
            rows: Which of those after them to keep, counted from ``past``, ascending.
        """
        # By slices, one row at a time: indices would have to go to the device first.
        for place, row in enumerate(rows):
            if place != row:
                for buffer in (*self._keys[: self._num_layers], *self._values[: self._num_layers]):
                    if buffer is not None:
                        buffer[:, :, past + place] = buffer[:, :, past + row]
        self.rollback(past + len(rows))

    @contextmanager
    def recompute_last(self, positions: int) -> Iterator[None]:
        """For the enclosed pass, go back by some positions, which it runs together with the new ones.

        The pass writes them in the slots after the model's layers alone. In the model's layers it reads what the target
        model wrote: verification builds on that, and a draft's own keys would change the output.

        Args:
            positions: How many of the last positions the pass runs again.
        """
        verified = self.length
        self.rollback(verified - positions)
        self._verified = verified
        try:
            yield
        finally:
            self.length, self._verified = verified, 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for buffers in (self._keys, self._values) for buffer in buffers if buffer is not None)
