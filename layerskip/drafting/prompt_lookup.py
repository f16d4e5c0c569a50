"""Drafts for free: what followed the text's last tokens where they came before."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerskip.drafting.drafter import Drafter, RoundResult
from layerskip.engine import DraftStep, Engine
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.sampling import Draft, Sampler


@dataclass(frozen=True)
class PromptLookup:
    """When to copy from the text, and how much.

    Args:
        shortest: Fewest last tokens that must have come before.
        longest: Most last tokens to look for; the longest that came before decides.
        length: Most tokens in a draft.

    Raises:
        InvalidInputError: A number is below 1, or ``longest`` below ``shortest``.
    """

    shortest: int = 2
    longest: int = 4
    length: int = 8
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how DraftProfile reads it from JSON

    def __post_init__(self) -> None:
        for name in ("shortest", "length"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"ngrams.{name}: expected at least 1, got {getattr(self, name)}")
        if self.longest < self.shortest:
            raise InvalidInputError(f"ngrams.longest: expected at least {self.shortest}, got {self.longest}")

    def __str__(self) -> str:
        return f"up to {self.length} tokens copied where the last {self.shortest} or more came before"


class NGramIndex:
    """A text that grows, and where its runs of tokens came last.

    Args:
        ngrams: Which runs to find.
    """

    def __init__(self, ngrams: PromptLookup) -> None:
        self._ngrams = ngrams
        self._text: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # where the text goes on behind a run's last occurrence but one

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        for token in tokens:
            # Runs that end here are found from now on, because something follows them.
            for run in self._runs():
                self._behind[run] = len(self._text)
            self._text.append(token)

    def copy(self, limit: int) -> list[int]:
        """What followed the text's longest last run, at most ``limit`` tokens; none if no run came before.

        Where that reaches the text's end it goes on with what was copied, as in a text that repeats itself.
        """
        for run in self._runs():
            if run in self._behind:
                start, copied = self._behind[run], list[int]()
                for place in range(start, start + min(limit, self._ngrams.length)):
                    beyond = place - len(self._text)
                    copied.append(self._text[place] if beyond < 0 else copied[beyond])
                return copied
        return []

    def _runs(self) -> list[tuple[int, ...]]:
        """The text's last tokens, the longest run first."""
        longest = min(self._ngrams.longest, len(self._text))
        return [tuple(self._text[-size:]) for size in range(longest, self._ngrams.shortest - 1, -1)]


class PromptLookupDrafter:
    """Proposes what followed the text's last tokens where they came before; nothing where they did not.

    Source: Saxena, "Prompt Lookup Decoding" (2023), github.com/apoorvumang/prompt-lookup-decoding.

    Args:
        ngrams: When to copy, and how much.
    """

    def __init__(self, ngrams: PromptLookup | None = None) -> None:
        self._ngrams = ngrams or PromptLookup()

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        self._index = NGramIndex(self._ngrams)
        self._index.extend(prompt.tolist())
        self._knows_newest = False

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        if not self._knows_newest:
            self._index.extend(newest.tolist())
            self._knows_newest = True
        return _certain(self._index.copy(limit), sampler, newest.device)

    def observe(self, outcome: RoundResult) -> None:
        self._index.extend(outcome.verdict.tokens)


def _certain(tokens: Sequence[int], sampler: Sampler, device: torch.device) -> Draft:
    """The draft of tokens that nothing else could have been: a vocabulary of them alone, and each sure in its place."""
    vocabulary = sorted(set(tokens))
    token_ids = torch.tensor(vocabulary, dtype=torch.long, device=device)
    logits = torch.full((len(tokens), len(vocabulary)), -torch.inf)
    for place, token in enumerate(tokens):
        logits[place, vocabulary.index(token)] = 0.0
    draws = [sampler.draft(DraftStep.of(row, token_ids, None), token_ids) for row in logits.to(device)]
    return Draft.of(draws, device, token_ids=token_ids)


def with_prompt_lookup(ngrams: PromptLookup | None, drafter: Drafter) -> Drafter:
    """A drafter that is asked where nothing can be copied; itself where nothing is to be copied."""
    return drafter if ngrams is None else FallbackDrafter(PromptLookupDrafter(ngrams), drafter)


class FallbackDrafter:
    """Asks one drafter, and another where the first proposes nothing.

    Args:
        first: Asked in every round.
        second: Asked where the first has nothing.
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
