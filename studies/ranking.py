"""Which trials of a study are best, and whether their speedups were measured or predicted."""

from __future__ import annotations

import json
import statistics
from collections.abc import Container, Sequence
from typing import Literal, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from layerskip.drafting.config import DraftConfig

Basis = Literal["measured", "predicted"]
# What the best figure for a candidate rests on.
Standing = Literal["held-out", "measured", "predicted"]
BASIS_KEY = "basis"
PREDICTED_KEY = "predicted_speedup"
STOPPED_KEY = "stopped_early"
DRAFT_COST_KEY = "draft_cost"
# The draft configuration with which a candidate was predicted, or measured, as JSON.
CONFIG_KEY = "config"


class HasTrials(Protocol):
    """A study, or a :class:`Snapshot` of one."""

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """As Optuna's studies have it."""


class Snapshot:
    """A study's trials as they are at one moment: every reading of a study asks its database anew.

    Args:
        study: The study.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._trials = study.get_trials(deepcopy=False)

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """The trials in some states, or all; never copied."""
        return [trial for trial in self._trials if states is None or trial.state in states]


def config_of(trial: FrozenTrial) -> DraftConfig:
    """The draft configuration with which a trial's candidate was predicted, or measured: its best policy included."""
    return DraftConfig.from_json(trial.user_attrs[CONFIG_KEY])


def completed_trials(study: HasTrials) -> Sequence[FrozenTrial]:
    """The trials that have a value."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def basis_of(trial: FrozenTrial) -> Basis:
    """Whether a trial's speedup was measured or predicted; one that says nothing was measured."""
    basis: Basis = trial.user_attrs.get(BASIS_KEY, "measured")
    return basis


def seen_trials(study: HasTrials) -> list[FrozenTrial]:
    """The trials that looked at a candidate; a measurement of it later is a trial of its own."""
    return [trial for trial in completed_trials(study) if basis_of(trial) == "predicted"]


def measured_trials(study: HasTrials) -> list[FrozenTrial]:
    """The trials that decoded for real."""
    return [trial for trial in completed_trials(study) if basis_of(trial) == "measured"]


def fully_measured_trials(study: HasTrials) -> list[FrozenTrial]:
    """Those that decoded all prompts; the speedup of a hopeless one is that of some prompts, which may be easy ones."""
    return [trial for trial in measured_trials(study) if STOPPED_KEY not in trial.user_attrs]


def correction_of(study: HasTrials) -> float:
    """How far predictions are off: the median of measured ÷ predicted speedup so far; 1 without measurements."""
    measured = [trial for trial in fully_measured_trials(study) if PREDICTED_KEY in trial.user_attrs]
    ratios = [speedup_of(trial) / trial.user_attrs[PREDICTED_KEY] for trial in measured]
    return statistics.median(ratios) if ratios else 1.0


def candidate_key(trial: FrozenTrial) -> str:
    """The same for trials of the same candidate, and different for all others."""
    return json.dumps(trial.params, sort_keys=True)


def speedup_of(trial: FrozenTrial) -> float:
    """A completed trial's speedup."""
    return float(trial.values[0])


def best_trials(study: HasTrials, count: int) -> list[FrozenTrial]:
    """The candidates with the highest speedups, best first, one trial for each.

    Where a candidate was measured, that counts, and what was predicted of it before does not. Predictions are corrected
    by :func:`correction_of` before they are held against measurements. What was found hopeless goes last.
    """
    correction = correction_of(study)
    best: dict[str, FrozenTrial] = {}
    for trial in completed_trials(study):
        other = best.get(candidate_key(trial))
        if other is None or _supersedes(trial, other):
            best[candidate_key(trial)] = trial

    def worth(trial: FrozenTrial) -> tuple[bool, float]:
        corrected = speedup_of(trial) * (correction if basis_of(trial) == "predicted" else 1.0)
        return STOPPED_KEY not in trial.user_attrs, corrected

    return sorted(best.values(), key=worth, reverse=True)[:count]


def finalists(study: HasTrials, count: int) -> list[FrozenTrial]:
    """The candidates to decide among: the best ones, and always the one that was measured to be fastest.

    The highest of many predictions are the luckiest, too; a measurement was not chosen for its luck.
    """
    best = best_trials(study, count)
    measured = max(fully_measured_trials(study), key=speedup_of, default=None)
    if measured is None or candidate_key(measured) in map(candidate_key, best):
        return best
    return [*best[: count - 1], measured]


def _supersedes(trial: FrozenTrial, other: FrozenTrial) -> bool:
    if basis_of(trial) != basis_of(other):
        return basis_of(trial) == "measured"
    return speedup_of(trial) > speedup_of(other)
