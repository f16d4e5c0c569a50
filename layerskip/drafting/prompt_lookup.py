"""Drafting without a model: copy what followed the text's last n-gram where it occurred before."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor

from layerskip.drafting.config import PromptLookup
from layerskip.drafting.drafter import Drafter, RoundResult
from layerskip.engine import Engine
from layerskip.kv_cache import KVCache
from layerskip.sampling import Draft, Sampler


class NGramIndex:
    """A growing text, and where each of its n-grams occurred last.

    Args:
        lookup: Which n-grams to find.
    """

    def __init__(self, lookup: PromptLookup) -> None:
        self._lookup = lookup
        self._text: list[int] = []
        self._continuations: dict[tuple[int, ...], int] = {}  # where the text continues an n-gram's last occurrence

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        for token in tokens:
            # N-grams that end here are found from now on, because something follows them.
            for ngram in self._last_ngrams():
                self._continuations[ngram] = len(self._text)
            self._text.append(token)

    def copy(self, limit: int) -> list[int]:
        """What followed the longest n-gram at the end of the text that occurred before, at most ``limit`` tokens.

        Where that reaches the text's end it continues with what was copied, as in a text that repeats itself.
        """
        for ngram in self._last_ngrams():
            if ngram in self._continuations:
                start, copied = self._continuations[ngram], list[int]()
                for place in range(start, start + min(limit, self._lookup.length)):
                    beyond = place - len(self._text)
                    copied.append(self._text[place] if beyond < 0 else copied[beyond])
                return copied
        return []

    def _last_ngrams(self) -> list[tuple[int, ...]]:
        """The n-grams at the end of the text, longest first."""
        longest = min(self._lookup.longest, len(self._text))
        return [tuple(self._text[-size:]) for size in range(longest, self._lookup.shortest - 1, -1)]


class PromptLookupDrafter:
    """Proposes what followed the text's last n-gram where it occurred before; nothing where it did not.

    Source: Saxena, "Prompt Lookup Decoding" (2023), github.com/apoorvumang/prompt-lookup-decoding.

    Args:
        lookup: When to copy, and how many tokens; None takes the defaults.
    """

    def __init__(self, lookup: PromptLookup | None = None) -> None:
        self._lookup = lookup or PromptLookup()

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        self._index = NGramIndex(self._lookup)
        self._index.extend(prompt.tolist())
        self._knows_newest = False

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        if not self._knows_newest:
            self._index.extend(newest.tolist())
            self._knows_newest = True
        return sampler.copied(self._index.copy(limit), newest.device)

    def observe(self, outcome: RoundResult) -> None:
        self._index.extend(outcome.verdict.tokens)


class FallbackDrafter:
    """Drafts with one drafter, and with another where the first proposes nothing.

    Args:
        first: Asked in every round.
        second: Asked where the first proposes nothing.
    """

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self._first, self._second = first, second

    def __copy__(self) -> FallbackDrafter:
        """Both copied too, so that the copy serves a generation of its own."""
        return FallbackDrafter(copy.copy(self._first), copy.copy(self._second))

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        self._first.start(engine, prompt, states)
        self._second.start(engine, prompt, states)

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        draft = self._first.propose(newest, cache, limit, sampler)
        return draft if len(draft) else self._second.propose(newest, cache, limit, sampler)

    def observe(self, outcome: RoundResult) -> None:
        self._first.observe(outcome)
        self._second.observe(outcome)
