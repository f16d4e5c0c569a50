"""Which candidate to decode for real next, and whether there is time for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.trials import COMPLETE_KEY, MEASURES_KEY, SECONDS_KEY, SOURCE_KEY
from studies.ranking import (
    HasTrials,
    Snapshot,
    candidate_key,
    correction_of,
    fully_measured_trials,
    measured_trials,
    seen_trials,
    speedup_of,
)


def promising(study: HasTrials) -> FrozenTrial | None:
    """The candidate of the highest prediction that was not measured yet and could beat the best that was."""
    measured = measured_trials(study)
    done = {candidate_key(trial) for trial in measured}
    open_ones = [t for t in seen_trials(study) if t.user_attrs[COMPLETE_KEY] and candidate_key(t) not in done]
    best = max(open_ones, key=speedup_of, default=None)
    to_beat = max(map(speedup_of, fully_measured_trials(study)), default=0.0)
    return best if best is not None and speedup_of(best) * correction_of(study) > to_beat else None


class MeasuringPlan:
    """A callback for a study: enqueues what is worth measuring, as far as there is time for it.

    Args:
        share: Most of the search's time that may go into measuring, from 0 to 1.
        seconds: What one measurement is expected to take.
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
        best = promising(now)
        if best is not None:
            attributes = {SOURCE_KEY: f"measurement of trial {best.number}", MEASURES_KEY: best.number}
            study.enqueue_trial(best.params, user_attrs=attributes, skip_if_exists=False)

    def _has_time(self, study: HasTrials) -> bool:
        measured = measured_trials(study)
        spent = [trial.user_attrs[SECONDS_KEY] for trial in measured if trial.number not in self._earlier]
        one = statistics.median(spent) if spent else self._seconds
        elapsed = time.perf_counter() - self._began
        return float(sum(spent) + one) <= self._share * (elapsed + one)


def _busy(study: HasTrials) -> bool:
    """Whether a measurement is under way, or would only queue up behind others: till then there may be a better one."""
    waiting, running = TrialState.WAITING, TrialState.RUNNING
    open_trials = study.get_trials(deepcopy=False, states=(waiting, running))
    return any(trial.state == waiting or MEASURES_KEY in trial.user_attrs for trial in open_trials)
