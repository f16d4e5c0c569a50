"""Which candidates of a search are measured, and how far."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import wilcoxon

from studies.ranking import (
    FULLY_TRACED_KEY,
    REVISITS_KEY,
    SOURCE_KEY,
    HasTrials,
    Snapshot,
    basis_of,
    candidate_key,
    completed_trials,
    evaluated_trials,
    predicted_trials,
    prediction_of,
    prompt_speedups,
)

# Attribute of trials: seconds that measuring took.
SECONDS_KEY = "measuring_seconds"

# A prediction this close to that of the best measured candidate may beat it: a dozen texts tell no more.
_NEAR = 0.85
# So many are measured in a search, the last ones however far they are: they tell how far predictions can be trusted.
_LEAST_MEASURED = 8
# Significance level below which a draft is taken to be slower than the best one.
_HOPELESS = 0.1


class MeasuringPruner(BasePruner):
    """Prunes trials after their prediction, unless they are worth measuring, and measurements that cannot win.

    The candidate measured next is the one with the highest prediction of all that were not measured, as long as it
    comes near the best measured one and time for it is left. Where that is an earlier, pruned trial, :meth:`revisit`
    enqueues its candidate again. Once enough candidates were evaluated, so are the best others of a search that
    measured few.

    Args:
        share: Largest share of the search's time that may go into measuring, from 0 to 1; unless it is 0, the
            best candidate of a search that measured none is measured at its end, whatever it takes.
        seconds: Expected duration of one measurement.
        trials: Candidates that the search evaluates.
        earlier: Numbers of the trials that finished before this search began.
    """

    def __init__(self, share: float, seconds: float, trials: int, earlier: Collection[int] = ()) -> None:
        self._share, self._trials = share, trials
        self._seconds = seconds
        self._earlier = frozenset(earlier)
        self._began = time.perf_counter()

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to end a trial, by its prediction or by the prompts measured so far."""
        now = Snapshot(study)
        measured = prompt_speedups(trial)
        if measured:
            return hopeless(measured, _best_measured(now))
        is_wanted = REVISITS_KEY in trial.user_attrs or next_to_measure(now, trial) is trial
        return not (self._has_time(now) and is_wanted)

    def revisit(self, study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        """A callback for a study: enqueue the candidate to be measured next, if nothing else is under way."""
        now = Snapshot(study)
        has_to_wait = bool(_waiting(now)) and not self._is_over(now)  # by then a better candidate may be known
        if _is_measuring(now) or has_to_wait or not self._has_time(now):
            return
        best = next_to_measure(now)
        if best is None and self._is_over(now) and len(_measured(now)) < _LEAST_MEASURED:
            best = best_unmeasured(predicted_trials(now), now)
        if best is not None:
            enqueue_to_measure(study, best)

    def _is_over(self, study: HasTrials) -> bool:
        return len(evaluated_trials(study)) >= self._trials

    def _has_time(self, study: HasTrials) -> bool:
        if self._is_over(study) and not _measured(study):
            return self._share > 0
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        spent = [
            float(trial.user_attrs[SECONDS_KEY])
            for trial in finished
            if SECONDS_KEY in trial.user_attrs and trial.number not in self._earlier
        ]
        expected = statistics.median(spent) if spent else self._seconds
        elapsed = time.perf_counter() - self._began
        return sum(spent) + expected <= self._share * (elapsed + expected)


def enqueue_to_measure(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enqueue a pruned trial's candidate again."""
    attributes = {SOURCE_KEY: f"trial {trial.number}, to be measured", REVISITS_KEY: trial.number}
    study.enqueue_trial(trial.params, user_attrs=attributes, skip_if_exists=False)


def is_to_be_measured(study: HasTrials) -> bool:
    """Whether a pruned candidate is enqueued to be measured."""
    return any(REVISITS_KEY in trial.user_attrs for trial in _waiting(study))


def next_to_measure(study: HasTrials, running: FrozenTrial | None = None) -> FrozenTrial | None:
    """The candidate with the highest prediction of those that were not measured; None if it is far from the best one.

    Args:
        study: The study.
        running: A trial that was just predicted, to take into account; of equal predictions, its counts.
    """
    candidates = [trial for trial in predicted_trials(study) if trial.user_attrs.get(FULLY_TRACED_KEY)]
    if running is not None and running.user_attrs.get(FULLY_TRACED_KEY):
        candidates.insert(0, running)
    best = best_unmeasured(candidates, study)
    fastest = max(completed_trials(study), key=lambda trial: trial.values[0], default=None)
    if best is None or (fastest is not None and prediction_of(best) < _NEAR * prediction_of(fastest)):
        return None
    return best


def best_unmeasured(trials: Sequence[FrozenTrial], study: HasTrials) -> FrozenTrial | None:
    """Of some trials the one with the highest prediction whose candidate was not measured, if any."""
    measured = _measured(study)
    unmeasured = [trial for trial in trials if candidate_key(trial) not in measured]
    return max(unmeasured, key=prediction_of, default=None)


def _measured(study: HasTrials) -> set[str]:
    """Keys of the candidates that were measured, at least in part."""
    return {candidate_key(trial) for trial in predicted_trials(study) if basis_of(trial) == "measured"}


def hopeless(speedups: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Whether a draft is slower than the best one, by Wilcoxon's signed-rank test on the prompts that both decoded.

    Args:
        speedups: The draft's, by prompt.
        best: The best draft's.
    """
    differences = [speedup - best[prompt] for prompt, speedup in speedups.items() if prompt in best]
    if not any(differences) or sum(differences) > 0:
        return False
    return float(wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue) < _HOPELESS


def _best_measured(study: HasTrials) -> Mapping[int, float]:
    """The speedup of each prompt with the best candidate that was measured so far."""
    best = max(completed_trials(study), key=lambda trial: trial.values[0], default=None)
    return {} if best is None else prompt_speedups(best)


def _is_measuring(study: HasTrials) -> bool:
    """Whether a measurement is under way or enqueued."""
    open_trials = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
    return any(REVISITS_KEY in trial.user_attrs for trial in open_trials)


def _waiting(study: HasTrials) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
