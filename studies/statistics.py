"""The speedup of several measurements taken together, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import bootstrap


class DecodedBothWays(Protocol):
    """One prompt's times, such as a :class:`studies.records.MeasurementRecord`."""

    @property
    def plain_seconds(self) -> float:
        """Of plain decoding."""

    @property
    def draft_seconds(self) -> float:
        """Of self-speculative decoding."""

    @property
    def tokens(self) -> int:
        """Of plain decoding."""

    @property
    def draft_tokens(self) -> int:
        """Of self-speculative decoding."""


@dataclass(frozen=True)
class Speedup:
    """A speedup with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}× (95 %: {self.low:.2f} to {self.high:.2f})"


# Of speedups that show nothing, in the same words wherever they are told.
NOTHING_FASTER = "nothing was shown to be faster"
# By chance alone all of n prompts lie above 1× with a probability of 2^-n, and the interval with them.
FEWEST_PROMPTS = 6
FEW_PROMPTS = f"fewer than {FEWEST_PROMPTS} prompts are not enough to show that anything is faster"
CROSSES_ONE = f"No clear gain (the interval crosses 1×): {NOTHING_FASTER}."


def speedup_of_prompt(one: DecodedBothWays) -> float:
    """Plain seconds ÷ self-speculative seconds, each for one token."""
    return (one.plain_seconds / one.tokens) / (one.draft_seconds / one.draft_tokens)


def speedup_of_all(measurements: Sequence[DecodedBothWays]) -> Speedup:
    """The speedup of all prompts' total times.

    Its 95 % interval comes from resampling prompts (percentile bootstrap with a fixed seed); with a single measurement
    it is that one's speedup alone.

    Args:
        measurements: At least one.
    """
    plain_seconds = np.array([one.plain_seconds for one in measurements])
    draft_seconds = np.array([one.draft_seconds for one in measurements])
    tokens = np.array([one.tokens for one in measurements])
    draft_tokens = np.array([one.draft_tokens for one in measurements])
    data = (plain_seconds, draft_seconds, tokens, draft_tokens)
    value = low = high = float(_ratio(*data))
    if len(measurements) > 1:
        interval = bootstrap(data, _ratio, paired=True, method="percentile", rng=np.random.default_rng(0))
        low, high = (float(end) for end in interval.confidence_interval)
    return Speedup(value, low, high)


def _ratio(plain_s: np.ndarray, draft_s: np.ndarray, n: np.ndarray, draft_n: np.ndarray, axis: int = -1) -> np.ndarray:
    ratio: np.ndarray = (plain_s.sum(axis) / n.sum(axis)) / (draft_s.sum(axis) / draft_n.sum(axis))
    return ratio
