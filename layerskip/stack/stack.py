"""What one pass runs: sublayers in order, and the rows of the head that score what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from layerskip.stack.skipset import SkipSet
from layerskip.stack.sublayers import LayerStandIn, PassContext


class Step(Protocol):
    """Anything that takes hidden states one step up the stack: a sublayer, or what stands in for several."""

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        """Hidden states ``[1, n, hidden_size]`` before the step; those after it, of the same shape."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The full model's sublayers, or a draft: the same with some left out.

    Args:
        steps: What runs, each with the index of the (first) sublayer that it stands for, ascending.
        shared: How many sublayers at the bottom are those of the full model; all of them in the full model itself.
        token_ids: ``[n]``, the tokens that the head scores; None for the whole vocabulary.
        head_rows: ``[n, hidden_size]``, the head's weights for these tokens.
    """

    steps: tuple[tuple[int, Step], ...]
    shared: int
    token_ids: Tensor | None = None
    head_rows: Tensor | None = field(default=None, repr=False)

    @property
    def remembers(self) -> bool:
        """Whether a step keeps keys and values of its own, so that it has to see the whole text."""
        return self.remembers_from is not None

    @property
    def remembers_from(self) -> int | None:
        """The index of the first step that keeps keys and values of its own; None if none does."""
        return next((index for index, step in self.steps if isinstance(step, LayerStandIn)), None)

    def run(self, x: Tensor, context: PassContext, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the steps from sublayer ``start`` on and before sublayer ``stop``.

        Args:
            x: ``[1, n, hidden_size]``, hidden states before sublayer ``start``.
            context: What the pass shares.
            start: Index of the first sublayer to run.
            stop: Index of the first sublayer not to run; None runs to the top.
        """
        for index, step in self.steps:
            if index >= start and (stop is None or index < stop):
                x = step(x, context)
        return x


def keep(sublayers: Sequence[Step], skip_set: SkipSet, stand_ins: Mapping[int, Step]) -> Stack:
    """The stack with some sublayers left out.

    Args:
        sublayers: The full model's.
        skip_set: What to leave out.
        stand_ins: What runs instead of a run of skipped sublayers, by the index of the run's first.
    """
    kept = {index: sublayers[index] for index in skip_set.kept}
    shared = skip_set.mask.index(True) if len(skip_set) else len(sublayers)
    return Stack(tuple(sorted((kept | dict(stand_ins)).items(), key=lambda step: step[0])), shared)
