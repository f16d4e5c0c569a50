"""Drafters propose tokens: a tree of them, most often a chain.

Verification and generation treat every drafter alike. Plain decoding is the drafter that proposes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from layerskip.drafting.config import DraftConfig
from layerskip.engine import DraftStep, Engine, Scored, highest_probability
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sampling import Draft, Draw, Sampler, Verdict
from layerskip.token_tree import numbers_on, widths_of


@dataclass(frozen=True)
class RoundResult:
    """The result of one round of drafting and verification.

    Args:
        draft: The proposed tokens, ``k`` of them, maybe none.
        verdict: Which of them were accepted.
        tokens: ``[k + 1]``, the rows of the draft's tree: the text's newest token, and the drafted ones.
        scored: The target model's scores after each of them, ``[k + 1, ...]``.
    """

    draft: Draft
    verdict: Verdict
    tokens: Tensor
    scored: Scored

    @property
    def seen(self) -> Tensor:
        """``[accepted + 1]``, the text's newest token before the round and the accepted ones, now in the cache."""
        return self.tokens.index_select(0, numbers_on(self.verdict.rows, self.tokens.device))

    @property
    def logits(self) -> Tensor:
        """``[vocab_size]``, the target model's, from which it chose the round's last token itself."""
        return self.scored.logits[self.verdict.rows[-1]]

    @property
    def states(self) -> Tensor:
        """``[accepted + 1, hidden_size]``, the target's last hidden states of the tokens in ``seen``; a copy, which
        later passes leave alone."""
        return self.scored.states.index_select(0, numbers_on(self.verdict.rows, self.tokens.device))


class Drafter(Protocol):
    """Proposes the next tokens of a text. One drafter serves one generation at a time."""

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        """Begin a generation, and forget earlier ones.

        Args:
            engine: Runs the passes of this generation.
            prompt: ``[n]``, token ids.
            states: ``[m, hidden_size]``, the target model's last hidden states of the prompt's last ``m`` tokens, those
                that were run (all of them unless decoding resumes from a cached prefix), in memory that later passes
                leave alone. From the last one the first new token was chosen.
        """

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        """Propose at most ``limit`` tokens (``limit`` may be 0) to follow ``newest``.

        Args:
            newest: ``[1]``, the last token of the text, not in the cache yet.
            cache: Keys and values of the text before. A drafter may write after its length and move it; generation
                rolls it back.
            limit: Most tokens that could be used; no path of the draft is longer.
            sampler: Chooses tokens; each must be drawn from the distribution that the draft reports for it.
        """

    def observe(self, outcome: RoundResult) -> None:
        """Learn from the result of a round."""


class NoDrafter:
    """Proposes nothing: plain decoding."""

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        pass

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        return Draft.of([], newest.device)

    def observe(self, outcome: RoundResult) -> None:
        pass


class BaseDrafter:
    """Base of drafters that propose place by place: stopping rule, target-confidence threshold and tree.

    Args:
        model: The model that will verify.
        config: How to draft.
    """

    def __init__(self, model: LayerSkipModel, config: DraftConfig) -> None:
        self._model = model
        self._stopping = config.stopping
        self._target_confidence_threshold = config.target_confidence_threshold
        self._widths = widths_of(config.tree)

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        """As :meth:`Drafter.start`.

        Raises:
            InvalidInputError: The engine runs a model of other sizes.
        """
        ours, others = ((m.vocab_size, m.num_layers, m.config.hidden_size) for m in (self._model, engine.model))
        if ours != others:
            raise InvalidInputError(
                "drafter: is for another model; make one for the model that decodes: profile.drafter(model)"
            )
        self._stop = self._stopping.new_state()
        self._paused = False
        self._steps = 0  # of the last draft

    def _draws(
        self,
        tokens: Tensor,
        limit: int,
        sampler: Sampler,
        token_ids: Tensor | None,
        step: Callable[[Tensor], DraftStep],
    ) -> list[Draw]:
        """Draft a chain, with siblings at each place, until the stopping rule ends it.

        Args:
            tokens: Input of the first step.
            limit: Most places.
            sampler: Chooses tokens.
            token_ids: ``[n]``, the draft vocabulary; None is the whole one.
            step: Drafts one place; later steps get the token that was chosen last, ``[1]``.
        """
        draws: list[Draw] = []
        while len(draws) < min(limit, self._stop.max_length) and not self._paused:
            scored = step(tokens)
            draws.append(sampler.draft(scored, token_ids, self._widths_at(len(draws))[0]))
            chosen = draws[-1].tokens
            tokens = chosen if len(chosen) == 1 else chosen[:1]  # the very tensor: a captured step may have it in place
            if self._stop.reads_confidence and self._stop.stops_after(float(scored.confidence)):
                break
        self._steps = len(draws)
        return draws

    def _widths_at(self, place: int) -> tuple[int, ...]:
        return self._widths[place] if place < len(self._widths) else (1,)

    def observe(self, outcome: RoundResult) -> None:
        """As :meth:`Drafter.observe`."""
        if self._steps:
            accepted = min(outcome.verdict.accepted, self._steps)  # another drafter may have continued the draft
            self._stop.observe(self._steps, accepted)
        self._steps = 0  # the next draft may be another drafter's
        threshold = self._target_confidence_threshold
        # Reading a probability makes the host wait for the device.
        self._paused = threshold > 0 and float(highest_probability(outcome.logits)) < threshold
