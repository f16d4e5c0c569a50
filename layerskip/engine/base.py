"""The interface of an engine: what drafting and decoding ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from layerskip.checks import shown
from layerskip.costs import PassCosts
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sublayers import Stack
from layerskip.token_tree import TokenTree


@dataclass(frozen=True)
class DraftStep:
    """The output of one draft step.

    Args:
        logits: ``[n]``, scores in float32, one for each token of the draft's vocabulary.
        likeliest: ``[1]``, the id of the token with the highest score.
        prefix: ``[1, 1, hidden_size]``, the hidden states at the top of what draft and target model share; None if they
            share nothing.
    """

    logits: Tensor
    likeliest: Tensor
    prefix: Tensor | None

    @property
    def confidence(self) -> Tensor:
        """``[]``, that token's probability, before temperature, top-k and top-p; computed where a rule reads it."""
        return highest_probability(self.logits)

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor | None, prefix: Tensor | None) -> DraftStep:
        """The step with these logits, by tensor operations alone, so that it can be captured.

        Args:
            logits: ``[n]``.
            token_ids: ``[n]``, the draft vocabulary; None for the whole one.
            prefix: As in the class.
        """
        column = logits.max(-1, keepdim=True).indices  # on a CPU in a third of argmax's time
        likeliest = column if token_ids is None else token_ids[column]
        return cls(logits, likeliest, prefix)


def highest_probability(logits: Tensor) -> Tensor:
    """The probability, ``[]``, of the likeliest token under the softmax of all logits, ``[n]``."""
    return (logits.max() - logits.logsumexp(-1)).exp()


@dataclass(frozen=True)
class SharedPrefix:
    """The part of the verification's pass that drafting already computed.

    Args:
        states: ``[1, k, hidden_size]``, the hidden states of the text's last token and of all drafted tokens but the
            last, before sublayer ``depth``. The cache holds the keys and values of the sublayers below.
        depth: How many sublayers they have been through.
    """

    states: Tensor
    depth: int


@dataclass(frozen=True)
class Scored:
    """The output of a pass of the target model.

    Args:
        logits: ``[n, vocab_size]``, scores after each of ``n`` tokens, in float32; of a prompt, ``[1, vocab_size]``,
            after the last of them.
        states: ``[n, hidden_size]``, the hidden states after the last sublayer, of each token.
    """

    logits: Tensor
    states: Tensor


class Engine(Protocol):
    """Runs passes of one model. One engine serves one generation at a time.

    Attributes:
        name: Its name, by which it is chosen.
        model: The model whose passes it runs.
        passes: What they run through: the model, or the same model over modules of the engine's own.
        captures: Whether the first decoding takes longer than later ones, because it captures or compiles passes.
        resumes: Whether verification can resume from the hidden states that drafting computed.
        costs: What passes cost on this machine, by which verification chooses its width; None takes the width that it
            needs.
    """

    name: str
    model: LayerSkipModel
    passes: LayerSkipModel
    resumes: bool
    costs: PassCosts | None

    @property
    def captures(self) -> bool: ...

    def check_current(self) -> None:
        """Make sure that the model is as it was when the engine was made.

        Raises:
            InvalidInputError: It was changed such that passes would not compute what it computes now.
            UnsupportedModelError: A hook or the like was attached that would not run.
        """

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache with room for ``capacity`` positions, for the passes of this engine."""

    def can_continue(self, cache: KVCache) -> bool:
        """Whether a cache that this engine handed out can still be used; it grows as the text does."""

    def prefill(self, tokens: Tensor, cache: KVCache) -> Scored:
        """Run a prompt, or the rest of one, ``[n]``.

        Returns:
            Scores after its last token, and the hidden states of all its tokens, which later passes leave alone.
        """

    def draft_step(self, tokens: Tensor, cache: KVCache, stack: Stack) -> DraftStep:
        """Run tokens, ``[m]``, through a draft's stack; the cache moves forward by one.

        Args:
            tokens: A new token, and before it the last ``m - 1`` of the text that the stack has not seen yet: more
                than one only if the stack keeps keys and values of its own.
            cache: Keys and values of the text before the new token.
            stack: The draft's.

        Returns:
            The step after the last token.
        """

    def verify(
        self, tokens: Tensor, cache: KVCache, shared: SharedPrefix | None = None, tree: TokenTree | None = None
    ) -> Scored:
        """Run the text's last token and the ``k`` drafted ones, ``[k + 1]``, through the target model.

        Args:
            tokens: The tokens.
            cache: Keys and values of the text before; moves forward by ``k + 1``.
            shared: The part that drafting already computed, if any; unused where the tree branches.
            tree: Which token follows which; None is a chain.

        Returns:
            Scores and hidden states after each of them. The next pass may overwrite them.
        """


def check_is_engine(value: object) -> None:
    """Make sure that a value is an engine.

    Raises:
        InvalidInputError: It is something else, such as an engine's name or class.
    """
    if isinstance(value, type) or not hasattr(value, "verify"):
        raise InvalidInputError(f"engine: expected an engine, got {shown(value)}; make one: make_engine(model)")
