"""Which candidates of a search are measured, and when."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.objective import COMPLETE_KEY, MEASURES_KEY, SECONDS_KEY, SOURCE_KEY
from studies.ranking import (
    HasTrials,
    Snapshot,
    candidate_key,
    correction_of,
    evaluated_trials,
    fully_measured_trials,
    measured_trials,
    speedup_of,
)


def next_to_measure(study: HasTrials) -> FrozenTrial | None:
    """The candidate with the highest prediction that was not measured yet, if it could beat the best measured one."""
    measured = {candidate_key(trial) for trial in measured_trials(study)}
    unmeasured = [t for t in evaluated_trials(study) if t.user_attrs[COMPLETE_KEY] and candidate_key(t) not in measured]
    best = max(unmeasured, key=speedup_of, default=None)
    to_beat = max(map(speedup_of, fully_measured_trials(study)), default=0.0)
    return best if best is not None and speedup_of(best) * correction_of(study) > to_beat else None


class MeasurementScheduler:
    """A callback for a study: enqueues the measurement of the most promising candidate while time for it is left.

    Args:
        share: Largest share of the search's time that may go into measuring, from 0 to 1.
        seconds: Expected duration of one measurement.
        earlier: Numbers of the trials that were measured before this search began.
    """

    def __init__(self, share: float, seconds: float, earlier: Collection[int]) -> None:
        self._share = share
        self._seconds = seconds
        self._earlier = earlier
        self._began = time.perf_counter()

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        now = Snapshot(study)
        if _busy(now) or not self._has_time(now):
            return
        best = next_to_measure(now)
        if best is not None:
            attributes = {SOURCE_KEY: f"measurement of trial {best.number}", MEASURES_KEY: best.number}
            study.enqueue_trial(best.params, user_attrs=attributes, skip_if_exists=False)

    def _has_time(self, study: HasTrials) -> bool:
        measured = measured_trials(study)
        spent = [trial.user_attrs[SECONDS_KEY] for trial in measured if trial.number not in self._earlier]
        expected = statistics.median(spent) if spent else self._seconds
        elapsed = time.perf_counter() - self._began
        return float(sum(spent) + expected) <= self._share * (elapsed + expected)


def _busy(study: HasTrials) -> bool:
    """Whether a measurement is under way, or would have to wait for other trials; by then a better one may be known."""
    waiting, running = TrialState.WAITING, TrialState.RUNNING
    open_trials = study.get_trials(deepcopy=False, states=(waiting, running))
    return any(trial.state == waiting or MEASURES_KEY in trial.user_attrs for trial in open_trials)
