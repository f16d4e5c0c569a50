"""Drafting without a model: copy what followed the end of the text where it occurred before."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor

from layerskip.costs import DraftRoundCosts
from layerskip.drafting.config import PromptLookup
from layerskip.drafting.controller import Controller
from layerskip.drafting.drafter import Drafter, NoDrafter, RoundResult
from layerskip.drafting.suffix_automaton import SuffixAutomaton
from layerskip.engine import Engine
from layerskip.kv_cache import KVCache
from layerskip.sampling import Draft, Sampler


def copy_from(text: SuffixAutomaton, lookup: PromptLookup, limit: int, drafted: Sequence[int] = ()) -> list[int]:
    """What followed the longest run at the end of the text that occurred before.

    Where it reaches the text's end it goes on with what was drafted and copied since, as in a text that repeats itself.

    Args:
        text: The text so far.
        lookup: When to copy, and how much.
        limit: Most tokens to copy.
        drafted: Tokens after the text. The run then is one at their end, and occurs in the text itself.
    """
    match = text.match_after(drafted) if drafted else text.match
    if match.length < lookup.shortest:
        return []
    count = max(min(limit, lookup.per_match * match.length), 0)
    known, new = text.text, list(drafted)
    for place in range(match.end, match.end + count):
        new.append(known[place] if place < len(known) else new[place - len(known)])
    return new[len(drafted) :]


class PromptLookupDrafter:
    """Copies what followed the text's end where it occurred before; another drafter drafts where nothing can be copied.

    What that one drafts is continued by a copy, too, if the text with it ends with what occurred before.

    Sources: Saxena, "Prompt Lookup Decoding" (2023), github.com/apoorvumang/prompt-lookup-decoding; for runs of any
    length, SAM decoding (arXiv 2411.10666); for copies that are longer the longer the run, SuffixDecoding (arXiv
    2411.04975).

    Args:
        lookup: When to copy, and how many tokens; None takes the defaults.
        drafter: Drafts where nothing can be copied; None drafts nothing there.
        costs: What rounds cost; with them, copying pauses where it does not pay.
    """

    def __init__(
        self,
        lookup: PromptLookup | None = None,
        drafter: Drafter | None = None,
        costs: DraftRoundCosts | None = None,
    ) -> None:
        self._lookup = lookup or PromptLookup()
        self._drafter = drafter or NoDrafter()
        self._costs = costs
        self._controller = Controller(costs)

    def __copy__(self) -> PromptLookupDrafter:
        """With a copy of the other drafter, so that the copy serves a generation of its own."""
        return PromptLookupDrafter(self._lookup, copy.copy(self._drafter), self._costs)

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        self._drafter.start(engine, prompt, states)
        self._text = SuffixAutomaton()
        self._text.extend(prompt.tolist())
        self._knows_newest = False
        self._controller.start()
        self._copied = 0  # tokens of the last draft, where it was a copy

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        if not self._knows_newest:
            self._text.extend(newest.tolist())
            self._knows_newest = True
        self._context = cache.length
        copied = copy_from(self._text, self._lookup, self._controller.limit(min(limit, self._lookup.length)))
        self._copied = len(copied)
        if copied:
            return Draft.certain(copied, newest.device)
        draft = self._drafter.propose(newest, cache, limit, sampler)
        if not len(draft):
            return draft
        room = min(limit - draft.tree.depth, self._lookup.length - len(draft))
        path = draft.main_path.tolist()
        return draft.continued(copy_from(self._text, self._lookup, self._controller.limit(room), path))

    def observe(self, outcome: RoundResult) -> None:
        self._text.extend(outcome.verdict.tokens)
        if self._copied:
            self._controller.observe(outcome, self._context, drafted=0, copied=self._copied)
        else:
            self._controller.rest()
        self._drafter.observe(outcome)
