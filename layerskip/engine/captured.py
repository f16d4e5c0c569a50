"""Captured passes with the buffers that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerskip.engine.interface import DraftStep, Scored
from layerskip.stack.tree import Tree, ancestors_on, numbers_on


@dataclass(frozen=True)
class CapturedVerification:
    """A pass of the full model of one width and bucket.

    Args:
        tokens: ``[width]``, where it reads the tokens.
        positions: ``[width]``, where it reads their positions.
        replay: Runs it; the next replay overwrites what it gives.
    """

    tokens: Tensor
    positions: Tensor
    replay: Callable[[], Scored]

    def __call__(self, tokens: Tensor, past: int) -> Scored:
        """The pass of up to ``width`` tokens behind ``past`` others; behind them, of whatever was there before."""
        self.tokens[: len(tokens)].copy_(tokens)
        torch.arange(past, past + len(self.positions), out=self.positions)
        return self.replay()


@dataclass(frozen=True)
class CapturedTree:
    """A pass of the full model over trees of one width, of any shape, in one bucket.

    Args:
        tokens: ``[width]``, where it reads the tokens.
        slots: ``[width]``, where it reads where in the cache they go.
        positions: ``[width]``, where it reads their positions in the text.
        ancestors: ``[width, width]``, where it reads which rows each comes from.
        replay: Runs it; the next replay overwrites what it gives.
    """

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    ancestors: Tensor
    replay: Callable[[], Scored]

    def __call__(self, tokens: Tensor, past: int, tree: Tree) -> Scored:
        """The pass of a tree behind ``past`` tokens; behind its rows, of whatever was there before."""
        width, device = len(self.tokens), self.tokens.device
        tree = tree.padded(width)
        self.tokens[: len(tokens)].copy_(tokens)
        torch.arange(past, past + width, out=self.slots)
        torch.add(numbers_on(tree.depths, device), past, out=self.positions)
        self.ancestors.copy_(ancestors_on(tree, device))
        return self.replay()


class CapturedDraft:
    """A draft step of one stack and bucket, which leaves its choice and its next position where it will read them.

    Args:
        token: ``[1]``, where it reads the token and leaves its likeliest next one.
        position: ``[1]``, where it reads the position and leaves the next.
        replay: Runs it; the next replay overwrites what it gives.
    """

    def __init__(self, token: Tensor, position: Tensor, replay: Callable[[], DraftStep]) -> None:
        self._token, self._position, self._replay = token, position, replay
        # What the buffers hold, so that a step that goes on from the last one has nothing to set.
        self._next_token: Tensor | None = None
        self._next_past: int | None = None

    def __call__(self, token: Tensor, past: int) -> DraftStep:
        """The step of a token behind ``past`` others."""
        if token is not self._next_token:
            self._token.copy_(token)
        if past != self._next_past:
            self._position.fill_(past)
        self._next_token = self._next_past = None  # should the replay be interrupted, nobody knows
        step = self._replay()
        # Kept to the draft's end, while the next replay writes to the same buffer.
        step = replace(step, likeliest=step.likeliest.clone())
        self._next_token, self._next_past = step.likeliest, past + 1
        return step
