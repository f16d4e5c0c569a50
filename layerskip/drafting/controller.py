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
# Rounds of the first pause, and of the longest.
_FIRST_PAUSE = 8
_LONGEST_PAUSE = 1024
# No draft is longer.
_LONGEST = 64


class Controller:
    """Says how many tokens one source of proposals may propose, by how its earlier proposals did.

    Each round's gain, its tokens less its cost in plain decoding steps, is added to a credit. Without credit left the
    source pauses; each pause is twice as long as the one before, until so much was gained again that the credit is
    full. The first proposal, and the first after a pause, is one token; they grow while all of them are accepted. So
    what a source that is never right loses grows with the logarithm of the text's length: some five or six rounds of
    one token in the first 128.

    What it learned stays when the next text starts, which waits for the first pause at most. It depends on costs that
    were measured once, and not on the clock: the same rounds have the same proposals.

    Args:
        costs: What rounds cost; None proposes as much as is asked for.
    """

    def __init__(self, costs: DraftRoundCosts | None) -> None:
        self._costs = costs
        self._credit = _FIRST_CREDIT
        self._longest = 1
        self._pause = _FIRST_PAUSE
        self._waiting = 0

    def start(self) -> None:
        """Begin a text."""
        self._waiting = min(self._waiting, _FIRST_PAUSE)

    def limit(self, wanted: int) -> int:
        """How many of so many tokens may be proposed."""
        if self._costs is None:
            return wanted
        return 0 if self._waiting else min(wanted, self._longest)

    def observe(self, outcome: RoundResult, context: int, *, drafted: int, copied: int = 0) -> None:
        """Learn from a round in which the source proposed something.

        Args:
            outcome: The round's.
            context: The length of the text before it.
            drafted: Places that the model drafted.
            copied: Tokens that came from the text, where the source is that.
        """
        if self._costs is None:
            return
        cost = self._costs.plain_steps(context, places=drafted, tokens=len(outcome.tokens))
        self._credit = min(self._credit + len(outcome.verdict.tokens) - cost, _MOST_CREDIT)
        proposed = drafted + copied
        if outcome.verdict.accepted >= proposed:
            self._longest = min(2 * max(self._longest, proposed), _LONGEST)
        if self._credit == _MOST_CREDIT:
            self._pause = _FIRST_PAUSE
        if self._credit < 0:
            self._credit, self._longest = 0.0, 1
            self._waiting, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)

    def rest(self) -> None:
        """Learn of a round in which the source proposed nothing."""
        self._waiting = max(self._waiting - 1, 0)


class ControlledDrafter:
    """A drafter under a controller.

    Args:
        drafter: Drafts.
        costs: What its rounds cost.
    """

    def __init__(self, drafter: Drafter, costs: DraftRoundCosts) -> None:
        self._drafter = drafter
        self._costs = costs
        self._controller = Controller(costs)

    def __copy__(self) -> ControlledDrafter:
        """With a controller of its own, so that the copy serves a generation of its own."""
        return ControlledDrafter(copy.copy(self._drafter), self._costs)

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        self._drafter.start(engine, prompt, states)
        self._controller.start()
        self._drafted = 0

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        self._context = cache.length
        draft = self._drafter.propose(newest, cache, self._controller.limit(limit), sampler)
        self._drafted = draft.tree.depth
        return draft

    def observe(self, outcome: RoundResult) -> None:
        if self._drafted:
            self._controller.observe(outcome, self._context, drafted=self._drafted)
        else:
            self._controller.rest()
        self._drafted = 0  # the next draft may be another drafter's
        self._drafter.observe(outcome)
