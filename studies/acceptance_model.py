"""Acceptance model: what each part of a draft does to the acceptance rate α, learned from the rates of many drafts.

``ln(1 - ln(α) / 0.3)``, the *damage* of a draft, is 0 where α is 1, and sublayers add up to it about linearly. It is
regressed on what drafts skip, and on what they have in place of that, by Bayesian linear regression with a normal prior
of nonnegative mean. Mean and deviation of the prior and deviation of the noise come from a small grid, by marginal
likelihood.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerskip.drafting.config import DraftConfig, DraftLayerRef
from layerskip.names import Precision

Floats = NDArray[np.float64]

# Where damage begins to count less: −ln α adds up only as long as it is small, and its noise grows with it.
_SCALE = 0.3
# An estimate over finitely many positions cannot tell smaller rates apart.
_LOWEST_ACCEPTANCE = 0.01
# Hyperparameters, each tried with each: mean and deviation of what a sublayer does, and deviation of the noise.
_MEANS = (0.01, 0.03, 0.1, 0.3)
_DEVIATIONS = (0.01, 0.03, 0.1, 0.3)
_NOISES = (0.03, 0.1, 0.3)
# Share of the posterior's deviation in samples. With all of it, some of many sublayers always look harmless by luck: on
# six models of benchmarks/samplers.py, half found 81 instead of 79 % of what can be gained, with interaction 1 60
# instead of 53 %.
_POSTERIOR_SCALE = 0.5
# Prior mean in units of a sublayer's: bridges repair a part of each sublayer's damage.
_REPAIRED = -0.2
_DEVIATIONS_OF_95_PERCENT = 1.96
# With fewer, an estimate says no more than its prior does.
LEAST_CANDIDATES = 10


def damage_of(acceptance: ArrayLike) -> Floats:
    """``ln(1 - ln(α) / 0.3)`` of acceptance rates."""
    damage: Floats = np.log1p(-np.log(np.clip(acceptance, _LOWEST_ACCEPTANCE, 1)) / _SCALE)
    return damage


def acceptance_of(damage: Floats) -> Floats:
    """The inverse of :func:`damage_of`."""
    return np.exp(-_SCALE * np.expm1(damage))


@dataclass(frozen=True, eq=False)
class Damage:
    """What each part of a draft adds to its damage.

    Args:
        sublayers: ``[2 * num_layers]``, of skipping each sublayer.
        bridged_sublayer: What bridges change of that, for each skipped sublayer.
        bridges: Of having bridges at all.
        vocabularies: Of draft vocabularies, by size.
        precisions: Of lower precisions.
        draft_layers: Of draft layers, each in place of everything above its exit.
    """

    sublayers: Floats
    bridged_sublayer: float
    bridges: float
    vocabularies: Mapping[int, float]
    precisions: Mapping[Precision, float] = field(default_factory=dict)
    draft_layers: Mapping[DraftLayerRef, float] = field(default_factory=dict)

    def of_sublayers(self, bridges: bool) -> Floats:
        """``[2 * num_layers]``, none below 0: skipping never brings a draft closer to the target model."""
        return np.maximum(self.sublayers + self.bridged_sublayer * bridges, 0)

    def of_options(self, config: DraftConfig) -> float:
        """What a draft loses whatever it skips below its exit; not below 0."""
        total = self.bridges * config.bridges + self.vocabularies.get(config.vocabulary_size, 0.0)
        total += self.precisions.get(config.precision, 0.0)
        if config.draft_layer is not None:
            total += self.draft_layers[config.draft_layer]
        return max(total, 0.0)


class AcceptanceModel:
    """Bayesian linear regression of :func:`damage_of` on what drafts skip and what they have in place of it.

    There is no constant: the target model itself does no damage.

    Args:
        acceptance: Acceptance rates, from 0 to 1, by draft; maybe none.
        num_sublayers: Sublayers of the model.
        vocabulary_sizes: Sizes of draft vocabularies to learn the damage of; 0 does none.
        precisions: Precisions likewise; ``full`` does none.
        draft_layers: Draft layers likewise.
    """

    def __init__(
        self,
        acceptance: Mapping[DraftConfig, float],
        num_sublayers: int,
        vocabulary_sizes: Sequence[int] = (),
        precisions: Sequence[Precision] = (),
        draft_layers: Sequence[DraftLayerRef] = (),
    ) -> None:
        self._num_sublayers = num_sublayers
        self._sizes = [size for size in vocabulary_sizes if size]
        self._precisions = [precision for precision in precisions if precision != "full"]
        # A draft layer repairs most of what is skipped above its exit. How much, is as uncertain as the damage of the
        # square root of these sublayers.
        self._scales = {layer: math.sqrt(layer.stop - layer.start) for layer in draft_layers}
        others = len(self._sizes) + len(self._precisions) + len(self._scales)
        self._prior = np.array([1.0] * num_sublayers + [_REPAIRED, 0.0] + [1.0] * others)
        self._x = np.array([self._features(config) for config in acceptance]).reshape(-1, len(self._prior))
        self._y = damage_of(list(acceptance.values()))

    def _features(self, config: DraftConfig) -> Floats:
        """What the weights are multiplied with: the parts of a :class:`Damage`, in its order."""
        skipped = np.zeros(self._num_sublayers)
        skipped[[2 * layer for layer in config.skip_set.attention]] = 1
        skipped[[2 * layer + 1 for layer in config.skip_set.mlp]] = 1
        skipped[config.exit_at :] = 0
        options = [
            config.bridges * skipped.sum(),
            config.bridges,
            *(config.vocabulary_size == size for size in self._sizes),
            *(config.precision == precision for precision in self._precisions),
            *(scale * (config.draft_layer == layer) for layer, scale in self._scales.items()),
        ]
        return np.concatenate([skipped, options])

    def sample(self, rng: np.random.Generator) -> Damage:
        """Damages drawn from what the drafts leave possible (Thompson sampling), closer to the mean than that."""
        grid, likelihood = self._hyperparameters()
        mean, factor = self._posterior(*grid[rng.choice(len(grid), p=likelihood)])
        return self._damage(mean + _POSTERIOR_SCALE * np.linalg.solve(factor.T, rng.standard_normal(len(mean))))

    def intervals(self) -> tuple[Floats, Floats, Floats]:
        """Mean and ends of the 95 % interval of each sublayer's damage, over all hyperparameters."""
        grid, likelihood = self._hyperparameters()
        means, squares = [], []
        for hyperparameters in grid:
            mean, factor = self._posterior(*hyperparameters)
            covariance = np.linalg.inv(factor @ factor.T)
            means.append(mean)
            squares.append(mean**2 + np.diag(covariance))
        mean = (likelihood @ np.array(means))[: self._num_sublayers]
        variance = (likelihood @ np.array(squares))[: self._num_sublayers] - mean**2
        margin = _DEVIATIONS_OF_95_PERCENT * np.sqrt(np.maximum(variance, 0))
        return mean, mean - margin, mean + margin

    def _posterior(self, mean: float, deviation: float, noise: float) -> tuple[Floats, Floats]:
        """Mean of the weights, and the Cholesky factor of their precision matrix."""
        precision = self._x.T @ self._x / noise**2 + np.eye(len(self._prior)) / deviation**2
        information = self._x.T @ self._y / noise**2 + mean * self._prior / deviation**2
        return np.linalg.solve(precision, information), np.linalg.cholesky(precision)

    def _hyperparameters(self) -> tuple[list[tuple[float, float, float]], Floats]:
        """The grid of hyperparameters, and how likely each makes what was seen."""
        spread, vectors = np.linalg.eigh(self._x @ self._x.T)
        y, prior = vectors.T @ self._y, vectors.T @ (self._x @ self._prior)
        grid = list(itertools.product(_MEANS, _DEVIATIONS, _NOISES))
        logs = []
        for mean, deviation, noise in grid:
            variance = deviation**2 * np.maximum(spread, 0) + noise**2
            logs.append(-0.5 * np.sum((y - mean * prior) ** 2 / variance + np.log(variance)))
        likelihood = np.exp(np.array(logs) - max(logs))
        return grid, likelihood / likelihood.sum()

    def _damage(self, weights: Floats) -> Damage:
        sublayers, (bridged_sublayer, bridges), others = np.split(
            weights, [self._num_sublayers, self._num_sublayers + 2]
        )
        of_sizes, of_precisions, of_layers = np.split(others, np.cumsum([len(self._sizes), len(self._precisions)]))
        return Damage(
            sublayers,
            float(bridged_sublayer),
            float(bridges),
            dict(zip(self._sizes, of_sizes.tolist(), strict=True)),
            dict(zip(self._precisions, of_precisions.tolist(), strict=True)),
            dict(zip(self._scales, (of_layers * list(self._scales.values())).tolist(), strict=True)),
        )


@dataclass(frozen=True)
class LearnedAcceptance:
    """The acceptance rate of a draft that skips one sublayer alone, learned from many drafts, with its interval."""

    value: float
    low: float
    high: float


def learned_acceptance(acceptance: Mapping[DraftConfig, float]) -> dict[int, LearnedAcceptance]:
    """What skipping each sublayer alone would do, learned from drafts that skip several.

    Args:
        acceptance: Acceptance rates by draft; drafts with a draft layer tell too little of sublayers and do not count.

    Returns:
        By the sublayer's index in the stack; only sublayers that some draft skips and another keeps. Nothing from fewer
        than ``LEAST_CANDIDATES`` drafts.
    """
    known = {config: rate for config, rate in acceptance.items() if config.draft_layer is None}
    if len(known) < LEAST_CANDIDATES:
        return {}
    masks = np.array([config.skip_set.mask for config in known])
    sizes, precisions = (sorted({getattr(c, name) for c in known}) for name in ("vocabulary_size", "precision"))
    model = AcceptanceModel(known, masks.shape[1], sizes, precisions)
    # A draft never agrees more than always.
    values, highs, lows = (acceptance_of(np.maximum(damage, 0)).tolist() for damage in model.intervals())
    tried = masks.any(axis=0) & ~masks.all(axis=0)
    return {i: LearnedAcceptance(values[i], lows[i], highs[i]) for i in np.flatnonzero(tried).tolist()}
