"""Who proposes tokens.

A drafter proposes a tree of tokens, most often a chain; verification and the loop treat every drafter alike. Plain
decoding is the drafter that proposes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layerskip.drafting.stopping import DraftStopping
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import DraftStep, Engine, Scored, SharedPrefix, highest_probability
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sampling import Draft, Draw, Sampler, Verdict
from layerskip.skip_set import SkipSet
from layerskip.sublayers import Step
from layerskip.token_tree import Branches, widths_of


@dataclass(frozen=True)
class RoundResult:
    """How a round went.

    Args:
        draft: What was proposed, ``k`` tokens, maybe none.
        verdict: What stood.
        tokens: ``[k + 1]``, the rows of the draft's tree: the token behind which was drafted, and the drafted ones.
        scored: What the target model made of them, ``[k + 1, ...]``.
    """

    draft: Draft
    verdict: Verdict
    tokens: Tensor
    scored: Scored

    @property
    def seen(self) -> Tensor:
        """``[accepted + 1]``, the token behind which was drafted and those that stood: the cache holds them now."""
        return self.tokens[list(self.verdict.rows)]

    @property
    def logits(self) -> Tensor:
        """``[vocab_size]``, the target model's, for the token that it chose itself at the round's end."""
        return self.scored.logits[self.verdict.rows[-1]]

    @property
    def states(self) -> Tensor:
        """``[accepted + 1, hidden_size]``, the target's last hidden states of the tokens in ``seen``; a copy, which
        later passes leave alone."""
        # Stacked row by row: indices would have to go to the device first.
        return torch.stack([self.scored.states[row] for row in self.verdict.rows])


class Drafter(Protocol):
    """Proposes how the text might go on. One drafter serves one generation at a time."""

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        """Begin a generation, and forget what earlier generations taught.

        Args:
            engine: Runs the passes of this generation.
            prompt: ``[n]``, token ids.
            states: ``[m, hidden_size]``, the target model's last hidden states of the prompt's last ``m`` tokens, those
                that were run (all of them unless an earlier text is gone on with), in memory that later passes leave
                alone. From the last one the first new token was chosen.
        """

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        """Propose at most ``limit`` tokens (``limit`` may be 0) to follow ``newest``.

        Args:
            newest: ``[1]``, the last token of the text, not in the cache yet.
            cache: Keys and values of the text before. A drafter may write behind its length and move it; the loop
                rolls it back.
            limit: Most tokens that could be used; no path of the draft is longer.
            sampler: Chooses tokens; each must be drawn from the distribution that the draft reports for it.
        """

    def observe(self, outcome: RoundResult) -> None:
        """Learn how a round went."""


class NoDrafter:
    """Proposes nothing: plain decoding."""

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        pass

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        return Draft.of([], newest.device)

    def observe(self, outcome: RoundResult) -> None:
        pass


class BaseDrafter:
    """What drafters have in common that go forward place by place: when they stop, when they rest, how they branch.

    Args:
        draft_exit: When to stop proposing.
        gate: Propose nothing after a round at whose end the target model gave its likeliest token a probability below
            this; 0 always proposes.
        branches: How many tokens to propose for the first place of a draft, for the second, and so on; for later ones,
            one. A number counts those behind the first token of the place before.

    Raises:
        InvalidInputError: The gate is not from 0 to 1, or the branches are not from 1 on or too many.
    """

    def __init__(self, draft_exit: DraftStopping, *, gate: float = 0.0, branches: Branches = ()) -> None:
        if not 0 <= gate <= 1:
            raise InvalidInputError(f"gate: expected a number from 0 to 1, got {gate}")
        self._draft_exit = draft_exit
        self._gate = gate
        self._widths = widths_of(branches)

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        """As :meth:`Drafter.start`."""
        self._exit = self._draft_exit.new_state()
        self._unsure = False
        self._steps = 0  # of the last draft

    def _draws(
        self,
        tokens: Tensor,
        limit: int,
        sampler: Sampler,
        token_ids: Tensor | None,
        step: Callable[[Tensor], DraftStep],
    ) -> list[Draw]:
        """Go forward behind the first token of each place, until the draft ends.

        Args:
            tokens: What the first step is given.
            limit: Most places.
            sampler: Chooses tokens.
            token_ids: ``[n]``, the draft vocabulary; None is the whole one.
            step: Goes one place forward; later steps are given the token that was chosen last, ``[1]``.
        """
        draws: list[Draw] = []
        while len(draws) < min(limit, self._exit.max_length) and not self._unsure:
            made = step(tokens)
            draws.append(sampler.draft(made, token_ids, self._widths_at(len(draws))[0]))
            tokens = draws[-1].tokens[:1]
            if self._exit.reads_confidence and self._exit.stops_after(float(made.confidence)):
                break
        self._steps = len(draws)
        return draws

    def _widths_at(self, place: int) -> tuple[int, ...]:
        return self._widths[place] if place < len(self._widths) else (1,)

    def observe(self, outcome: RoundResult) -> None:
        """As :meth:`Drafter.observe`."""
        if self._steps:
            self._exit.observe(self._steps, outcome.verdict.accepted)
        self._steps = 0  # the next draft may be another drafter's
        # Reading a probability makes the host wait for the device.
        self._unsure = self._gate > 0 and float(highest_probability(outcome.logits)) < self._gate


class LayerSkipDrafter(BaseDrafter):
    """Drafts with the model itself, some sublayers left out.

    Args:
        model: The model that will verify.
        skip_set: What to leave out.
        draft_exit: When to stop proposing.
        stand_ins: What runs instead of a run of skipped sublayers, such as bridges, by the index of the run's first.
        token_ids: ``[n]``, the draft vocabulary: the tokens that may be proposed; None for all.
        gate: As in :class:`BaseDrafter`.
        branches: Likewise, one number for each place.

    Raises:
        InvalidInputError: The skip set is for another number of layers, the gate is not from 0 to 1, or the branches
            are not from 1 on or too many.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        skip_set: SkipSet,
        draft_exit: DraftStopping,
        *,
        stand_ins: Mapping[int, Step] | None = None,
        token_ids: Tensor | None = None,
        gate: float = 0.0,
        branches: Branches = (),
    ) -> None:
        super().__init__(draft_exit, gate=gate, branches=branches)
        if any(len(place) > 1 for place in self._widths):
            raise InvalidInputError(
                "branches: only draft heads go on behind several tokens of a place; give one number for each place"
            )
        self._stack = model.stack_of(skip_set, stand_ins=stand_ins, token_ids=token_ids)

    @classmethod
    def of(
        cls,
        model: LayerSkipModel,
        skip_set: SkipSet,
        draft_exit: DraftStopping,
        assets: DraftWeights,
        *,
        gate: float = 0.0,
        branches: Branches = (),
    ) -> LayerSkipDrafter:
        """The drafter with these stand-ins and this draft vocabulary, brought to where the model is."""
        here = assets.to(torch.empty(0, dtype=model.dtype, device=model.device))
        return cls(
            model,
            skip_set,
            draft_exit,
            stand_ins=here.stand_ins(model),
            token_ids=here.token_ids,
            gate=gate,
            branches=branches,
        )

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        super().start(engine, prompt, states)
        self._engine = engine
        self._unseen = prompt  # the end of the text before the newest token that a stack that remembers has not seen

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        prefixes: list[Tensor] = []

        def step(tokens: Tensor) -> DraftStep:
            made = self._engine.draft_step(tokens, cache, self._stack)
            if made.prefix is not None:
                prefixes.append(made.prefix)
            return made

        unseen = torch.cat([self._unseen, newest]) if self._stack.remembers else newest
        draws = self._draws(unseen, limit, sampler, self._stack.token_ids, step)
        shared = SharedPrefix(torch.cat(prefixes, dim=1), self._stack.shared) if prefixes else None
        return Draft.of(draws, newest.device, token_ids=self._stack.token_ids, shared=shared)

    def observe(self, outcome: RoundResult) -> None:
        # The first rows of the tree were run, and hold certain tokens now as far as the text runs through them.
        seen = sum(row < self._steps for row in outcome.verdict.rows)
        if self._stack.remembers:
            self._unseen = torch.cat([self._unseen[:0] if seen else self._unseen, outcome.seen[seen:]])
        super().observe(outcome)
