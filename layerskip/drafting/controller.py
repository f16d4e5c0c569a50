"""Proposing no harm: where proposals cost more time than they save, they pause."""

from __future__ import annotations

import copy

from torch import Tensor

from layerskip.costs import DraftRoundCosts
from layerskip.drafting.drafter import Drafter, RoundResult
from layerskip.engine import Engine
from layerskip.kv_cache import KVCache
from layerskip.sampling import Draft, Sampler

# Plain decoding steps that proposals may lose at first, and that they may have saved up.
_FIRST_CREDIT = 1.0
_MOST_CREDIT = 6.0
# Tokens of the first proposal. Lost where proposals are right / where none is, simulated on texts of two models: with 4
# tokens 1 % / 5 to 7 %; with one 2 to 4 % / 3 to 6 %; without a limit 0 to 1 % / 7 to 8 %.
_FIRST_PROPOSAL = 4
# Rounds of the first pause, of the longest, and of the longest at the start of a text.
_FIRST_PAUSE = 8
_LONGEST_PAUSE = 1024
_LONGEST_PAUSE_AT_FIRST = 64


class Controller:
    """Says how many tokens one source of proposals may propose, by what its earlier proposals gained.

    Gains are in plain decoding steps: the tokens of a round less what it cost. They are added to a credit; a source
    whose credit is used up pauses, each time twice as long, until so much was gained again that the credit is full. The
    first proposal is short, the first after a pause is one token; while all that may be proposed is accepted, twice as
    much may be, and nothing pauses. So what a source that is never right loses grows with the logarithm of the text's
    length: some five or six rounds in the first 128, of one token after the first pause.

    What it learned stays when the next text starts. It depends on costs that were measured once and not on the clock:
    the same rounds have the same proposals.
    """

    def __init__(self) -> None:
        self._credit = _FIRST_CREDIT
        self._longest = _FIRST_PROPOSAL
        self._pause = _FIRST_PAUSE
        self._waiting = 0

    def start(self) -> None:
        """Begin a text."""
        self._waiting = min(self._waiting, _FIRST_PAUSE)
        self._pause = min(self._pause, _LONGEST_PAUSE_AT_FIRST)

    def limit(self, wanted: int) -> int:
        """How many of so many tokens may be proposed."""
        return 0 if self._waiting else min(wanted, self._longest)

    def observe(self, gain: float, *, proposed: int, accepted: int) -> None:
        """Learn from a round.

        Args:
            gain: Its tokens less its cost, in plain decoding steps.
            proposed: Tokens of this source on one path, at least one.
            accepted: How many of them were accepted.
        """
        self._credit = min(self._credit + gain, _MOST_CREDIT)
        if self._credit == _MOST_CREDIT:
            self._pause = _FIRST_PAUSE
        if accepted >= proposed >= self._longest:
            self._longest = 2 * proposed
        elif self._credit < 0:
            self._credit, self._longest = 0.0, 1
            self._waiting, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)

    def rest(self) -> None:
        """Learn of a round in which the source proposed nothing."""
        self._waiting = max(self._waiting - 1, 0)


class ControlledDrafter:
    """A drafter under a controller, with engines and on devices like those that its costs were measured on.

    Args:
        drafter: Drafts.
        costs: What its rounds cost.
    """

    def __init__(self, drafter: Drafter, costs: DraftRoundCosts) -> None:
        self._drafter = drafter
        self._costs = costs
        self._controller = Controller()

    def __copy__(self) -> ControlledDrafter:
        """With a controller of its own, so that the copy serves a generation of its own."""
        return ControlledDrafter(copy.copy(self._drafter), self._costs)

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        self._drafter.start(engine, prompt, states)
        self._controller.start()
        self._is_measured = self._costs.are_of(engine)
        self._places = 0  # of the last draft

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        if not self._is_measured:
            return self._drafter.propose(newest, cache, limit, sampler)
        context = cache.length
        draft = self._drafter.propose(newest, cache, self._controller.limit(limit), sampler)
        self._places = draft.tree.depth
        self._cost = self._costs.plain_steps(
            context, places=self._places, tokens=len(draft) + 1, resuming=draft.shared is not None
        )
        return draft

    def observe(self, outcome: RoundResult) -> None:
        if self._places:
            accepted = min(outcome.verdict.accepted, self._places)  # another drafter may have continued the draft
            self._controller.observe(accepted + 1 - self._cost, proposed=self._places, accepted=accepted)
        else:
            self._controller.rest()
        self._places = 0  # the next draft may be another drafter's
        self._drafter.observe(outcome)
