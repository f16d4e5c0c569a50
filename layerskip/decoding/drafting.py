"""Who proposes tokens.

A drafter proposes a chain of tokens; verification and the loop treat every drafter alike. Plain decoding is the
drafter that proposes nothing.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from layerskip.decoding.draft_exit import DraftExit
from layerskip.decoding.sampling import Draft, Draw, Sampler
from layerskip.stack.kv_cache import KVCache
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet


class Drafter(Protocol):
    """Proposes how the text might go on. One drafter serves one generation at a time."""

    def start(self) -> None:
        """Forget what earlier generations taught."""

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        """Propose at most ``limit`` tokens (``limit`` may be 0) to follow ``newest``.

        Args:
            newest: ``[1]``, the last token of the text, not in the cache yet.
            cache: Keys and values of the text before. A drafter may write behind its length and move it; the loop
                rolls it back.
            limit: Most tokens that could be used.
            sampler: Chooses tokens; each must be drawn from the distribution that the draft reports for it.
        """

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn that of ``drafted`` proposed tokens (at least one) ``accepted`` stood."""


class NoDrafter:
    """Proposes nothing: plain decoding."""

    def start(self) -> None:
        pass

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        return Draft.of([], newest.device)

    def observe(self, drafted: int, accepted: int) -> None:
        pass


class SkipDrafter:
    """Drafts with the model itself, some sublayers left out.

    Args:
        model: The model that will verify.
        skip_set: What to leave out.
        draft_exit: When to stop proposing.
    """

    def __init__(self, model: LayerSkipModel, skip_set: SkipSet, draft_exit: DraftExit) -> None:
        self._model = model
        self._skip_set = skip_set
        self._draft_exit = draft_exit
        self.start()

    def start(self) -> None:
        self._exit = self._draft_exit.controller()

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        draws: list[Draw] = []
        token = newest
        while len(draws) < min(limit, self._exit.max_length):
            logits = self._model.logits(self._model.forward(token, cache, self._skip_set))[0]
            draws.append(sampler.draw(logits))
            token = draws[-1].token
            if self._exit.reads_confidence and self._exit.stops_after(_confidence(logits, token)):
                break
        return Draft.of(draws, newest.device)

    def observe(self, drafted: int, accepted: int) -> None:
        self._exit.observe(drafted, accepted)


def _confidence(logits: Tensor, token: Tensor) -> float:
    """Probability of a token under the draft's own softmax, before temperature, top-k and top-p."""
    return float((logits[token] - logits.logsumexp(-1)).exp())
