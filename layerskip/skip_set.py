"""Which sublayers a draft leaves out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerskip.checks import shown, whole_number
from layerskip.errors import InvalidInputError


@dataclass(frozen=True)
class SkipSet:
    """The attention and MLP sublayers that a draft leaves out of a decoder of ``num_layers`` layers.

    The decoder is a flat stack of ``2 * num_layers`` sublayers, attention and MLP in turn: sublayer ``2 * i`` is the
    attention of layer ``i``, sublayer ``2 * i + 1`` its MLP.

    Args:
        num_layers: Number of decoder layers, at least 1.
        attention: Layers whose attention is skipped, each in ``[0, num_layers)`` and named once. Kept sorted.
        mlp: Layers whose MLP is skipped, likewise.

    Raises:
        InvalidInputError: An index is out of range or repeated, or nothing would be kept.
    """

    num_layers: int
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how DraftProfile reads it from JSON

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_layers", whole_number("num_layers", self.num_layers))
        if self.num_layers < 1:
            raise InvalidInputError(f"num_layers: expected at least 1, got {self.num_layers}")
        object.__setattr__(self, "attention", self._checked("attention", self.attention))
        object.__setattr__(self, "mlp", self._checked("mlp", self.mlp))
        if len(self) == 2 * self.num_layers:
            raise InvalidInputError(
                f"attention and mlp: all {2 * self.num_layers} sublayers are skipped; a draft must keep at least one"
            )

    def _checked(self, kind: str, layers: Iterable[int]) -> tuple[int, ...]:
        try:
            ordered = tuple(sorted(whole_number(kind, layer) for layer in layers))
        except TypeError as error:
            raise InvalidInputError(f"{kind}: expected the numbers of layers, got {shown(layers)}") from error
        for layer in ordered:
            if not 0 <= layer < self.num_layers:
                raise InvalidInputError(
                    f"{kind}: layer {layer} is out of range; the model has layers 0 to {self.num_layers - 1}"
                )
        for layer, following in itertools.pairwise(ordered):
            if layer == following:
                raise InvalidInputError(f"{kind}: layer {layer} is named twice; name each skipped layer once")
        return ordered

    @classmethod
    def from_mask(cls, skipped: Sequence[bool | int]) -> SkipSet:
        """Build a skip set from one flag per sublayer, in stack order; the inverse of :attr:`mask`.

        Raises:
            InvalidInputError: The number of flags is odd or zero, or every sublayer is skipped.
        """
        if len(skipped) % 2 or not skipped:
            raise InvalidInputError(f"mask: expected two flags for each layer, got {len(skipped)}")
        return cls(
            num_layers=len(skipped) // 2,
            attention=tuple(layer for layer, skip in enumerate(skipped[0::2]) if skip),
            mlp=tuple(layer for layer, skip in enumerate(skipped[1::2]) if skip),
        )

    @classmethod
    def of_sublayers(cls, indices: Iterable[int], num_layers: int) -> SkipSet:
        """The skip set of sublayers by their indices in the stack.

        Raises:
            InvalidInputError: Every sublayer is skipped.
        """
        skipped = set(indices)
        return cls.from_mask([index in skipped for index in range(2 * num_layers)])

    @classmethod
    def early_exit(cls, num_layers: int, keep: int) -> SkipSet:
        """The skip set of a draft that runs the first layers alone.

        Args:
            num_layers: Number of decoder layers.
            keep: How many of them the draft runs.

        Raises:
            InvalidInputError: They are none, or all.
        """
        if not 1 <= keep < num_layers:
            raise InvalidInputError(f"exit: expected 1 to {num_layers - 1}, layers of the model to keep, got {keep}")
        skipped = tuple(range(keep, num_layers))
        return cls(num_layers, skipped, skipped)

    @property
    def mask(self) -> tuple[bool, ...]:
        """One flag per sublayer, in stack order; true where the draft leaves the sublayer out."""
        return tuple(flag for pair in zip(self.skips_attention, self.skips_mlp, strict=True) for flag in pair)

    @property
    def skips_attention(self) -> tuple[bool, ...]:
        """One flag per layer; true where its attention is left out."""
        return tuple(layer in self.attention for layer in range(self.num_layers))

    @property
    def skips_mlp(self) -> tuple[bool, ...]:
        """One flag per layer; true where its MLP is left out."""
        return tuple(layer in self.mlp for layer in range(self.num_layers))

    @property
    def kept(self) -> tuple[int, ...]:
        """Stack indices of the sublayers that the draft runs, ascending."""
        return tuple(index for index, skip in enumerate(self.mask) if not skip)

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The maximal runs of skipped sublayers, each as (index of the first, index after the last), ascending."""
        runs = []
        for skipped, indices in itertools.groupby(range(len(self.mask)), key=self.mask.__getitem__):
            run = list(indices)
            if skipped:
                runs.append((run[0], run[-1] + 1))
        return tuple(runs)

    def __len__(self) -> int:
        """Number of sublayers left out."""
        return len(self.attention) + len(self.mlp)

    def __str__(self) -> str:
        named = [("attn", self.attention), ("mlp", self.mlp)]
        return " · ".join(f"{kind} {_ranges(layers)}" for kind, layers in named if layers) or "nothing skipped"


def _ranges(layers: Sequence[int]) -> str:
    """Write ascending layer numbers as ``3,5-8``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
