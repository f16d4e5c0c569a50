"""What leaving out each sublayer does to the acceptance rate, as far as a study's trials tell.

``ln(1 - ln(α) / 0.3)`` is 0 where α is 1, and sublayers add up to it about linearly. It is regressed on what drafts
leave out, with a normal prior around "no damage" whose width, and the noise, are those that make the trials likeliest
(ridge regression with empirical Bayes).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from studies.view import TrialSummary

Floats = NDArray[np.float64]

# Where damage begins to count less: −ln α adds up only as long as it is small.
_SCALE = 0.3
# An estimate over finitely many positions cannot tell smaller rates apart.
_LOWEST_ACCEPTANCE = 0.01
_PRIORS = (0.03, 0.1, 0.3, 1.0)
_NOISES = (0.03, 0.1, 0.3, 1.0)
_DEVIATIONS_OF_95_PERCENT = 1.96
# With fewer, an estimate says no more than its prior does.
LEAST_CANDIDATES = 10


@dataclass(frozen=True)
class LearnedAcceptance:
    """The acceptance rate of a draft that leaves out one sublayer alone, as trials of many tell, with its interval."""

    value: float
    low: float
    high: float


def learned_acceptance(seen: Sequence[TrialSummary]) -> dict[int, LearnedAcceptance]:
    """What leaving out each sublayer alone would do, learned from candidates that leave out several.

    Args:
        seen: Candidates that were looked at, each once; those with a trained stand-in tell too little and do not count.

    Returns:
        By the sublayer's index in the stack; those only that some candidate left out and another kept. Nothing where
        there are fewer than ``LEAST_CANDIDATES``.
    """
    known = [one for one in seen if one.acceptance is not None and not one.trained]
    if len(known) < LEAST_CANDIDATES:
        return {}
    x, y = _features(known), _damage(np.array([one.acceptance for one in known]))
    mean, deviation = _posterior(x, y)
    sublayers = len(known[0].skip_set.mask)
    tried = {i for i in range(sublayers) if 0 < x[:, i].sum() < len(known)}
    margin = _DEVIATIONS_OF_95_PERCENT * deviation
    values, lows, highs = (_acceptance(damage) for damage in (mean, mean + margin, mean - margin))
    return {i: LearnedAcceptance(float(values[i]), float(lows[i]), float(highs[i])) for i in sorted(tried)}


def _features(seen: Sequence[TrialSummary]) -> Floats:
    """``[n, sublayers + extras]``: what each candidate leaves out, what bridges mend of it, and its vocabulary.

    There is no constant, for the target model does no damage.
    """
    sizes = sorted({one.vocabulary for one in seen} - {0})
    rows = [
        [
            *map(float, one.skip_set.mask),
            float(one.bridged * len(one.skip_set)),
            *(float(one.vocabulary == size) for size in sizes),
        ]
        for one in seen
    ]
    return np.array(rows)


def _damage(acceptance: Floats) -> Floats:
    damage: Floats = np.log1p(-np.log(np.clip(acceptance, _LOWEST_ACCEPTANCE, 1)) / _SCALE)
    return damage


def _acceptance(damage: Floats) -> Floats:
    """The inverse of :func:`_damage`; a draft never agrees more than always."""
    acceptance: Floats = np.exp(-_SCALE * np.expm1(np.maximum(damage, 0)))
    return acceptance


def _posterior(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Mean and deviation of each weight."""
    prior, noise = max(itertools.product(_PRIORS, _NOISES), key=lambda pair: _evidence(x, y, *pair))
    covariance = np.linalg.inv(x.T @ x / noise**2 + np.eye(x.shape[1]) / prior**2)
    mean: Floats = covariance @ x.T @ y / noise**2
    deviation: Floats = np.sqrt(np.diag(covariance))
    return mean, deviation


def _evidence(x: Floats, y: Floats, prior: float, noise: float) -> float:
    """How likely a prior of this deviation makes what was seen, as a logarithm, up to a constant."""
    covariance = prior**2 * (x @ x.T) + noise**2 * np.eye(len(y))
    _, log_determinant = np.linalg.slogdet(covariance)
    return float(-0.5 * (y @ np.linalg.solve(covariance, y) + log_determinant))
