"""Ranking a study's trials by measured or predicted speedup."""

from __future__ import annotations

import json
import statistics
from collections.abc import Container, Sequence
from typing import Literal, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from layerskip.drafting.config import DraftConfig

Basis = Literal["measured", "predicted"]
# The basis of a candidate's best speedup.
BestBasis = Literal["held-out", "measured", "predicted"]
BASIS_KEY = "basis"
ACCEPTANCE_KEY = "acceptance"
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
    """A study's trials at one moment, read from its database once.

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
    """The trials with a value."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def basis_of(trial: FrozenTrial) -> Basis:
    """Whether a trial's speedup was measured or predicted; measured if the trial does not say."""
    basis: Basis = trial.user_attrs.get(BASIS_KEY, "measured")
    return basis


def evaluated_trials(study: HasTrials) -> list[FrozenTrial]:
    """The trials that predicted a candidate's speedup; a later measurement of it is a trial of its own."""
    return [trial for trial in completed_trials(study) if basis_of(trial) == "predicted"]


def measured_trials(study: HasTrials) -> list[FrozenTrial]:
    """The trials that measured a candidate's speedup."""
    return [trial for trial in completed_trials(study) if basis_of(trial) == "measured"]


def fully_measured_trials(study: HasTrials) -> list[FrozenTrial]:
    """The trials that measured all prompts, for some prompts alone may be easy ones."""
    return [trial for trial in measured_trials(study) if STOPPED_KEY not in trial.user_attrs]


def correction_of(study: HasTrials) -> float:
    """The median of measured ÷ predicted speedup so far; 1 without measurements."""
    measured = [trial for trial in fully_measured_trials(study) if PREDICTED_KEY in trial.user_attrs]
    ratios = [speedup_of(trial) / trial.user_attrs[PREDICTED_KEY] for trial in measured]
    return statistics.median(ratios) if ratios else 1.0


def candidate_key(trial: FrozenTrial) -> str:
    """A key that trials have in common exactly if their candidate is the same."""
    return json.dumps(trial.params, sort_keys=True)


def speedup_of(trial: FrozenTrial) -> float:
    """A completed trial's speedup."""
    return float(trial.values[0])


def best_trials(study: HasTrials, count: int) -> list[FrozenTrial]:
    """The candidates with the highest speedups, best first, one trial for each.

    A candidate's measurement replaces its prediction. Predictions are corrected by :func:`correction_of` for the
    comparison with measurements. Candidates whose measurement was stopped early come last.
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
    """The candidates to measure on held-out prompts: the best, always including the fastest measured candidate.

    The highest of many predictions are also the most overestimated; a single measurement is not.
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
