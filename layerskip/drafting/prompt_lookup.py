"""Drafting without a model: copy what followed the end of the text where it occurred before."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor

from layerskip.costs import DraftRoundCosts
from layerskip.drafting.config import PromptLookup
from layerskip.drafting.controller import Controller
from layerskip.drafting.drafter import Drafter, NoDrafter, RoundResult
from layerskip.drafting.suffix_automaton import Match, SuffixAutomaton
from layerskip.engine import Engine
from layerskip.kv_cache import KVCache
from layerskip.sampling import Draft, Sampler


class LookupText:
    """A growing text, and maybe a corpus, from which what followed the text's end earlier is copied.

    Args:
        lookup: When to copy, and how much.
        corpus: Another text to copy from, which does not grow; None without one.
    """

    def __init__(self, lookup: PromptLookup, corpus: SuffixAutomaton | None = None) -> None:
        self._lookup = lookup
        self._text = SuffixAutomaton()
        self._corpus = [] if corpus is None else corpus.text
        self._reader = None if corpus is None else corpus.reader()

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        self._text.extend(tokens)
        if self._reader is not None:
            self._reader.extend(tokens)

    def copy(self, limit: int, drafted: Sequence[int] = ()) -> list[int]:
        """What followed the longest run at the end of the text that occurred before, or in the corpus if longer there.

        Args:
            limit: Most tokens to copy.
            drafted: Tokens after the text. The run then is one at their end, and occurs in the text itself.
        """
        match = self._text.match_after(drafted) if drafted else self._text.match
        if self._reader is not None:
            elsewhere = self._reader.match_after(drafted)
            if elsewhere.length > match.length and elsewhere.end < len(self._corpus):  # or nothing follows it
                return self._corpus[elsewhere.end : elsewhere.end + tokens_to_copy(self._lookup, elsewhere, limit)]
        return copied(self._text, match, tokens_to_copy(self._lookup, match, limit), drafted)


def tokens_to_copy(lookup: PromptLookup, match: Match, limit: int) -> int:
    """How many tokens are copied from after a match, at most ``limit``."""
    return max(min(limit, lookup.per_match * match.length), 0) if match.length >= lookup.shortest else 0


def copied(text: SuffixAutomaton, match: Match, count: int, drafted: Sequence[int] = ()) -> list[int]:
    """So many tokens from after a match in the text itself.

    At the text's end they continue with the drafted tokens after it and with the first of their own, as in a text that
    repeats itself.
    """
    following = [*drafted, *text.text[match.end : match.end + count]]
    missing = len(drafted) + count - len(following)
    for place in range(missing):
        following.append(following[place])
    return following[len(drafted) :]


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
        corpus: Another text to copy from; None without one.
    """

    def __init__(
        self,
        lookup: PromptLookup | None = None,
        drafter: Drafter | None = None,
        costs: DraftRoundCosts | None = None,
        corpus: SuffixAutomaton | None = None,
    ) -> None:
        self._lookup = lookup or PromptLookup()
        self._drafter = drafter or NoDrafter()
        self._costs = costs
        self._corpus = corpus
        self._controller = Controller()

    def __copy__(self) -> PromptLookupDrafter:
        """With a copy of the other drafter, so that the copy serves a generation of its own."""
        return PromptLookupDrafter(self._lookup, copy.copy(self._drafter), self._costs, self._corpus)

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        self._drafter.start(engine, prompt, states)
        self._text = LookupText(self._lookup, self._corpus)
        self._text.extend(prompt.tolist())
        self._knows_newest = False
        self._controller.start()
        self._costs_here = self._costs if self._costs is not None and self._costs.are_of(engine) else None

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        if not self._knows_newest:
            self._text.extend(newest.tolist())
            self._knows_newest = True
        self._context = cache.length
        self._drafted, self._tokens_drafted, self._resuming = 0, 0, False
        found = self._text.copy(self._allowed(min(limit, self._lookup.length)))
        self._copied = len(found)
        if found:
            return Draft.certain(found, newest.device)
        draft = self._drafter.propose(newest, cache, limit, sampler)
        self._drafted, self._tokens_drafted = draft.tree.depth, len(draft)
        self._resuming = draft.shared is not None
        room = self._allowed(min(limit - self._drafted, self._lookup.length - len(draft)))
        if not len(draft) or room < 1:
            return draft
        tail = self._text.copy(room, draft.main_path.tolist())
        self._copied = len(tail)
        return draft.continued(tail)

    def observe(self, outcome: RoundResult) -> None:
        self._text.extend(outcome.verdict.tokens)
        if self._costs_here is not None:
            self._control(outcome, self._costs_here)
        self._drafter.observe(outcome)

    def _allowed(self, wanted: int) -> int:
        return wanted if self._costs_here is None else self._controller.limit(wanted)

    def _control(self, outcome: RoundResult, costs: DraftRoundCosts) -> None:
        """Tell the controller what the copied tokens gained: of a draft that they continue, what they added to it."""
        if not self._copied:
            self._controller.rest()
            return
        accepted = max(outcome.verdict.accepted - self._drafted, 0)
        drafted, context = self._tokens_drafted + 1, self._context
        cost = costs.plain_steps(context, places=self._drafted, tokens=drafted + self._copied)
        without = costs.plain_steps(context, places=self._drafted, tokens=drafted, resuming=self._resuming)
        self._controller.observe(accepted - (cost - without), proposed=self._copied, accepted=accepted)
