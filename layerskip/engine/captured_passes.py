"""Captured passes: where they read their inputs, and how they run on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerskip.engine.base import DraftStep, Scored
from layerskip.token_tree import TokenTree, ancestors_on, numbers_on


@dataclass(frozen=True)
class CapturedVerification:
    """A pass of the target model of one width and bucket.

    Args:
        tokens: ``[width]``, where it reads the tokens.
        positions: ``[width]``, where it reads their positions.
        replay: Runs it; the next replay overwrites its output.
    """

    tokens: Tensor
    positions: Tensor
    replay: Callable[[], Scored]

    def __call__(self, tokens: Tensor, past: int) -> Scored:
        """The pass of up to ``width`` tokens after ``past`` others, padded with whatever was there before."""
        self.tokens[: len(tokens)].copy_(tokens)
        torch.arange(past, past + len(self.positions), out=self.positions)
        return self.replay()


@dataclass(frozen=True)
class CapturedTree:
    """A pass of the target model over trees of one width, of any shape, in one bucket.

    Args:
        tokens: ``[width]``, where it reads the tokens.
        slots: ``[width]``, where it reads their places in the cache.
        positions: ``[width]``, where it reads their positions in the text.
        ancestors: ``[width, width]``, where it reads the ancestors of each row.
        replay: Runs it; the next replay overwrites its output.
    """

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    ancestors: Tensor
    replay: Callable[[], Scored]

    def __call__(self, tokens: Tensor, past: int, tree: TokenTree) -> Scored:
        """The pass of a tree after ``past`` tokens, padded with whatever was there before."""
        width, device = len(self.tokens), self.tokens.device
        tree = tree.padded(width)
        self.tokens[: len(tokens)].copy_(tokens)
        torch.arange(past, past + width, out=self.slots)
        torch.add(numbers_on(tree.depths, device), past, out=self.positions)
        self.ancestors.copy_(ancestors_on(tree, device))
        return self.replay()


class CapturedDraft:
    """A draft step of one stack and bucket, which writes its choice and its next position where it will read them.

    Args:
        token: ``[1]``, where it reads the token and writes its likeliest next one.
        position: ``[1]``, where it reads the position and writes the next.
        replay: Runs it; the next replay overwrites its output.
    """

    def __init__(self, token: Tensor, position: Tensor, replay: Callable[[], DraftStep]) -> None:
        self._token, self._position, self._replay = token, position, replay
        # The buffers' content, so that a step that continues the last one has nothing to set.
        self._next_token: Tensor | None = None
        self._next_past: int | None = None

    def __call__(self, token: Tensor, past: int) -> DraftStep:
        """The step of a token after ``past`` others."""
        # A slice of the last step's token is another tensor over the same memory.
        if self._next_token is None or token.data_ptr() != self._next_token.data_ptr():
            self._token.copy_(token)
        if past != self._next_past:
            self._position.fill_(past)
        self._next_token = self._next_past = None  # unknown, should the replay be interrupted
        step = _kept(self._replay())
        self._next_token, self._next_past = step.likeliest, past + 1
        return step


@dataclass(frozen=True)
class CapturedCatchUp:
    """A draft step over the text's last two tokens, of which a draft layer has not seen the first.

    It begins most drafts of a draft layer after a draft that was accepted whole.

    Args:
        tokens: ``[2]``, where it reads them.
        positions: ``[2]``, where it reads their positions.
        replay: Runs it; the next replay overwrites its output.
    """

    tokens: Tensor
    positions: Tensor
    replay: Callable[[], DraftStep]

    def __call__(self, tokens: Tensor, past: int) -> DraftStep:
        """The step of the last of ``past`` tokens, and of one after them."""
        self.tokens.copy_(tokens)
        torch.arange(past - 1, past + 1, out=self.positions)
        return _kept(self.replay())


def _kept(step: DraftStep) -> DraftStep:
    """A step whose token is used until the draft's end, while later replays write to the buffer that it was in."""
    return replace(step, likeliest=step.likeliest.clone())
