"""Who proposes tokens.

A drafter proposes a chain of tokens; verification and the loop treat every drafter alike. Plain decoding is the
drafter that proposes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from layerskip.decoding.draft_exit import DraftExit
from layerskip.decoding.sampling import Draft, Draw, Sampler
from layerskip.drafts.assets import DraftAssets
from layerskip.engine import SharedPrefix, highest_probability
from layerskip.errors import InvalidInputError
from layerskip.stack.kv_cache import KVCache
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from layerskip.stack.stack import Step


class Drafter(Protocol):
    """Proposes how the text might go on. One drafter serves one generation at a time."""

    def start(self, prompt: Tensor) -> None:
        """Begin a generation behind a prompt, ``[n]``, and forget what earlier generations taught."""

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        """Propose at most ``limit`` tokens (``limit`` may be 0) to follow ``newest``.

        Args:
            newest: ``[1]``, the last token of the text, not in the cache yet.
            cache: Keys and values of the text before. A drafter may write behind its length and move it; the loop
                rolls it back.
            limit: Most tokens that could be used.
            sampler: Chooses tokens; each must be drawn from the distribution that the draft reports for it.
        """

    def observe(self, drafted: int, accepted: int, logits: Tensor) -> None:
        """Learn how a round went.

        Args:
            drafted: Tokens proposed; may be 0.
            accepted: How many of them stood.
            logits: ``[vocab_size]``, the full model's, for the token that it chose itself at the round's end.
        """


class NoDrafter:
    """Proposes nothing: plain decoding."""

    def start(self, prompt: Tensor) -> None:
        pass

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        return Draft.of([], newest.device)

    def observe(self, drafted: int, accepted: int, logits: Tensor) -> None:
        pass


class SkipDrafter:
    """Drafts with the model itself, some sublayers left out.

    Args:
        model: The model that will verify.
        skip_set: What to leave out.
        draft_exit: When to stop proposing.
        stand_ins: What runs instead of a run of skipped sublayers, such as bridges, by the index of the run's first.
        token_ids: ``[n]``, the draft vocabulary: the tokens that may be proposed; None for all.
        gate: Propose nothing after a round at whose end the full model gave its likeliest token a probability below
            this; 0 always proposes.

    Raises:
        InvalidInputError: The skip set is for another number of layers, or the gate is not from 0 to 1.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        skip_set: SkipSet,
        draft_exit: DraftExit,
        *,
        stand_ins: Mapping[int, Step] | None = None,
        token_ids: Tensor | None = None,
        gate: float = 0.0,
    ) -> None:
        if not 0 <= gate <= 1:
            raise InvalidInputError(f"gate: expected a number from 0 to 1, got {gate}")
        self._model = model
        self._stack = model.stack_of(skip_set, stand_ins=stand_ins, token_ids=token_ids)
        self._draft_exit = draft_exit
        self._gate = gate

    @classmethod
    def of(
        cls, model: LayerSkipModel, skip_set: SkipSet, draft_exit: DraftExit, assets: DraftAssets, *, gate: float = 0.0
    ) -> SkipDrafter:
        """The drafter with these stand-ins and this draft vocabulary, brought to where the model is."""
        here = assets.to(torch.empty(0, dtype=model.dtype, device=model.device))
        return cls(model, skip_set, draft_exit, stand_ins=here.stand_ins(model), token_ids=here.token_ids, gate=gate)

    def start(self, prompt: Tensor) -> None:
        self._exit = self._draft_exit.controller()
        self._unsure = False
        self._unseen = prompt  # the end of the text before the newest token that a stack that remembers has not seen
        self._proposed = prompt[:0]

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        draws: list[Draw] = []
        prefixes: list[Tensor] = []
        tokens = torch.cat([self._unseen, newest]) if self._stack.remembers else newest
        while len(draws) < min(limit, self._exit.max_length) and not self._unsure:
            step = self._model.engine.draft_step(tokens, cache, self._stack)
            draws.append(sampler.draft(step, self._stack.token_ids))
            tokens = draws[-1].token
            if step.prefix is not None:
                prefixes.append(step.prefix)
            if self._exit.reads_confidence and self._exit.stops_after(float(step.confidence)):
                break
        shared = SharedPrefix(torch.cat(prefixes, dim=1), self._stack.shared) if prefixes else None
        draft = Draft.of(draws, newest.device, token_ids=self._stack.token_ids, shared=shared)
        self._proposed = torch.cat([newest, draft.tokens])
        return draft

    def observe(self, drafted: int, accepted: int, logits: Tensor) -> None:
        self._remember(drafted, accepted)
        if drafted:
            self._exit.observe(drafted, accepted)
        # Reading a probability makes the host wait for the device.
        self._unsure = self._gate > 0 and float(highest_probability(logits)) < self._gate

    def _remember(self, drafted: int, accepted: int) -> None:
        """Note what is certain now and was not seen: the last drafted token, if it stands, was never run."""
        before = self._proposed[:0] if drafted else self._unseen
        self._unseen = torch.cat([before, self._proposed[drafted : accepted + 1]])
