"""When copying from the text pays: what n-gram drafts would have proposed along reference texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from layerskip.drafting.config import DraftConfig, PromptLookup
from layerskip.drafting.prompt_lookup import NGramIndex
from layerskip.target_texts import TargetText

if TYPE_CHECKING:
    from search.replay import SimulatedSpeedup

_SHORTEST = (1, 2, 3)
_LENGTHS = (3, 7)
# Standard errors by which copies have to save time.
_SURE = 2.0


@dataclass(frozen=True, eq=False)
class Copies:
    """What was copied along one text.

    Args:
        drafted: ``[m]``, how many tokens would be proposed behind each new token; 0 where nothing came before.
        stand: ``[m]``, how many of them are what the target model wrote.
    """

    drafted: np.ndarray
    stand: np.ndarray

    @classmethod
    def of(cls, text: TargetText, ngrams: PromptLookup) -> Copies:
        """What n-grams would have proposed along a text."""
        tokens, index = text.tokens.tolist(), NGramIndex(ngrams)
        index.extend(tokens[: text.prompt_length])
        drafted, stand = [], []
        for place in range(text.prompt_length, len(tokens)):
            index.extend(tokens[place : place + 1])
            copied = index.copy(ngrams.length)
            drafted.append(len(copied))
            stand.append(_common(copied, tokens[place + 1 :]))
        return cls(np.array(drafted), np.array(stand))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two rows have in common."""
    different = [number for number, (one, other) in enumerate(zip(a, b, strict=False)) if one != other]
    return different[0] if different else min(len(a), len(b))


def settings_of_ngrams() -> list[PromptLookup]:
    """The n-grams that replay tries."""
    return [PromptLookup(shortest=shortest, length=length) for shortest in _SHORTEST for length in _LENGTHS]


def copies_along(texts: Sequence[TargetText]) -> dict[PromptLookup, list[Copies]]:
    """What each of the n-grams that replay tries would copy along each text."""
    return {ngrams: [Copies.of(text, ngrams) for text in texts] for ngrams in settings_of_ngrams()}


def with_copies(best: SimulatedSpeedup, replayed: Callable[[DraftConfig], SimulatedSpeedup]) -> SimulatedSpeedup:
    """The prediction with the copies that bring most as a first try; the one without where none clearly bring anything.

    A few texts that repeat themselves gain so much by copying that they decide the sum. So copies have to save time
    over the texts one by one, by a few standard errors.

    Args:
        best: Without copies.
        replayed: Foretells a policy.
    """
    tried = [replayed(replace(best.config, prompt_lookup=ngrams)) for ngrams in settings_of_ngrams()]
    clear = [one for one in tried if _saves(best.seconds, one.seconds)]
    return max(clear, key=lambda one: one.speedup, default=best)


def _saves(without: Sequence[float], seconds: Sequence[float]) -> bool:
    saved = 1 - np.divide(seconds, without)
    error = saved.std(ddof=1) / math.sqrt(len(saved)) if len(saved) > 1 else 0.0
    return bool(saved.mean() > _SURE * error)
