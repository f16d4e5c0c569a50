"""Speedups of measured prompts: of each, and of all together with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import bootstrap


class PromptTimes(Protocol):
    """One prompt decoded by plain decoding and another method, such as a :class:`studies.records.MeasurementRecord`."""

    @property
    def prompt(self) -> str:
        """The prompt's id."""

    @property
    def plain_seconds(self) -> float:
        """Of plain decoding."""

    @property
    def draft_seconds(self) -> float:
        """Of the other method."""

    @property
    def tokens(self) -> int:
        """Of plain decoding."""

    @property
    def draft_tokens(self) -> int:
        """Of the other method."""

    @property
    def drafted(self) -> int:
        """Tokens proposed."""

    @property
    def accepted(self) -> int:
        """Proposed tokens that were accepted."""


@dataclass(frozen=True)
class Speedup:
    """A speedup with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}× (95 %: {self.low:.2f} to {self.high:.2f})"


# What is said of speedups that show no gain.
NOTHING_FASTER = "nothing was shown to be faster"
# By chance alone all of n prompts lie above 1× with a probability of 2^-n, and the interval with them.
FEWEST_PROMPTS = 6
FEW_PROMPTS = f"No clear gain: fewer than {FEWEST_PROMPTS} prompts are not enough to show that anything is faster."
CROSSES_ONE = f"No clear gain (the interval crosses 1×): {NOTHING_FASTER}."


def describe_disturbed(disturbed: int, prompts: int) -> str:
    """What to say of times that were never confirmed."""
    which = "all prompts" if disturbed == prompts else f"{disturbed} of {prompts} prompts"
    return f"something else seems to be running on the machine: the times of {which} are uncertain; measure again later"


def speedup_of_prompt(times: PromptTimes) -> float:
    """Plain seconds ÷ the other method's seconds, each for one token."""
    return (times.plain_seconds / times.tokens) / (times.draft_seconds / times.draft_tokens)


def speedup_of_all(measurements: Sequence[PromptTimes]) -> Speedup:
    """The speedup of all prompts' total times.

    Its 95 % interval comes from resampling prompts (percentile bootstrap with a fixed seed); with a single prompt it
    has no width.

    Args:
        measurements: At least one.
    """
    times = [(m.plain_seconds, m.draft_seconds, m.tokens, m.draft_tokens) for m in measurements]
    data = tuple(np.array(times).T)
    value = low = high = float(_ratio(*data))
    if len(measurements) > 1:
        interval = bootstrap(data, _ratio, paired=True, method="percentile", rng=np.random.default_rng(0))
        low, high = (float(end) for end in interval.confidence_interval)
    return Speedup(value, low, high)


def _ratio(plain_s: np.ndarray, draft_s: np.ndarray, n: np.ndarray, draft_n: np.ndarray, axis: int = -1) -> np.ndarray:
    ratio: np.ndarray = (plain_s.sum(axis) / n.sum(axis)) / (draft_s.sum(axis) / draft_n.sum(axis))
    return ratio
