"""What leaving out each sublayer does to the acceptance rate, learned from trials by Bayesian linear regression."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from search.samplers.choices import Draft, DraftChoices
from search.samplers.speedup import Floats

# Where damage begins to count less: −ln α adds up only as long as it is small, and its noise grows with it.
_SCALE = 0.3
# An estimate over finitely many positions cannot tell smaller rates apart.
_LOWEST_ACCEPTANCE = 0.01
# (mean and deviation of what a sublayer does, deviation of the noise), each tried with each.
_MEANS = (0.01, 0.03, 0.1, 0.3)
_DEVIATIONS = (0.01, 0.03, 0.1, 0.3)
_NOISES = (0.03, 0.1, 0.3)
# Of the posterior's deviation. Drawn in full, some of many sublayers always look harmless by luck: on six models of
# benchmarks/samplers.py, half found 81 instead of 79 % of what can be gained, with interaction 1 60 instead of 53 %.
_BOLDNESS = 0.5
# Prior means in units of a sublayer's: a bridge mends a part of each sublayer's damage.
_MENDED = -0.2


def log_rejection(acceptance: float) -> float:
    """``ln(1 - ln(α) / 0.3)``, which is 0 where α is 1 and to which sublayers add up about linearly."""
    return float(np.log1p(-np.log(np.clip(acceptance, _LOWEST_ACCEPTANCE, 1)) / _SCALE))


def acceptance_of(damage: Floats) -> Floats:
    """The inverse of :func:`log_rejection`, of several."""
    return np.exp(-_SCALE * np.expm1(damage))


@dataclass(frozen=True, eq=False)
class Damage:
    """What everything that a draft may be does to it.

    Args:
        sublayers: ``[2 * num_layers]``, of leaving out each.
        mended: How much less that is where a bridge stands in.
        bridged: Of having bridges at all.
        vocabularies: By vocabulary size.
        stand_ins: Of having a trained stand-in above an exit, by its number.
    """

    sublayers: Floats
    mended: float
    bridged: float
    vocabularies: dict[int, float]
    stand_ins: dict[int, float] = field(default_factory=dict)

    def of_sublayers(self, bridged: bool) -> Floats:
        """``[2 * num_layers]``, none below 0: leaving something out never brings a draft closer to the target model."""
        return np.maximum(self.sublayers + self.mended * bridged, 0)

    def of_extras(self, bridged: bool, vocabulary: int, stand_in: int = 0) -> float:
        """What is lost whatever the mask."""
        of_both = self.vocabularies.get(vocabulary, 0.0) + self.stand_ins.get(stand_in, 0.0)
        return max(self.bridged * bridged + of_both, 0.0)


class DamageModel:
    """Bayesian linear regression of :func:`log_rejection` on what drafts are, with a normal prior of nonnegative mean.

    Mean and deviation of the prior and deviation of the noise come from a small grid, by marginal likelihood.

    Args:
        choices: What a draft may be.
        tried: Drafts that were tried; maybe none.
        acceptance: Their acceptance rates, from 0 to 1.
    """

    def __init__(self, choices: DraftChoices, tried: Sequence[Draft], acceptance: Sequence[float]) -> None:
        self._choices = choices
        self._sizes = [size for size in choices.vocabularies if size]
        # A stand-in mends most of what it stands for; how much, is as open as what the square root of them would do.
        self._scales = [math.sqrt(len(choices.bits) - start) for start in choices.exits]
        ones = [1.0] * (len(self._sizes) + len(self._scales))
        self._prior = np.array([1.0] * len(choices.bits) + [_MENDED, 0.0, *ones])
        self._x = np.array([self._features(draft) for draft in tried]).reshape(-1, len(self._prior))
        self._y = np.array([log_rejection(rate) for rate in acceptance])

    def _features(self, draft: Draft) -> list[float]:
        """What a :class:`Damage` is multiplied with; there is no constant, for the target model does no damage."""
        free = self._choices.free(draft.stand_in)
        mask = [skip and index < free for index, skip in enumerate(draft.mask)]
        return [
            *map(float, mask),
            float(draft.bridged * sum(mask)),
            float(draft.bridged),
            *(float(draft.vocabulary == size) for size in self._sizes),
            *(scale * (draft.stand_in == number) for number, scale in enumerate(self._scales, start=1)),
        ]

    def sample(self, rng: np.random.Generator) -> Damage:
        """Damages drawn from what the trials leave possible (Thompson sampling), closer to the mean than that."""
        mean, deviation, noise = self._sample_hyperparameters(rng)
        precision = self._x.T @ self._x / noise**2 + np.eye(len(self._prior)) / deviation**2
        information = self._x.T @ self._y / noise**2 + mean * self._prior / deviation**2
        factor = np.linalg.cholesky(precision)
        weights = np.linalg.solve(precision, information)
        weights += _BOLDNESS * np.linalg.solve(factor.T, rng.standard_normal(len(weights)))
        bits, stand_ins = len(self._choices.bits), len(weights) - len(self._scales)
        return Damage(
            weights[:bits],
            float(weights[bits]),
            float(weights[bits + 1]),
            dict(zip(self._sizes, weights[bits + 2 : stand_ins].tolist(), strict=True)),
            dict(enumerate((weights[stand_ins:] * self._scales).tolist(), start=1)),
        )

    def _sample_hyperparameters(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """One of the grid, by how likely it makes what was seen."""
        spread, vectors = np.linalg.eigh(self._x @ self._x.T)
        y, prior = vectors.T @ self._y, vectors.T @ (self._x @ self._prior)
        grid = list(itertools.product(_MEANS, _DEVIATIONS, _NOISES))
        logs = []
        for mean, deviation, noise in grid:
            variance = deviation**2 * np.maximum(spread, 0) + noise**2
            logs.append(-0.5 * np.sum((y - mean * prior) ** 2 / variance + np.log(variance)))
        likelihood = np.exp(np.array(logs) - max(logs))
        return grid[rng.choice(len(grid), p=likelihood / likelihood.sum())]
