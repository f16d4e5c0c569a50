"""Running a study's trials so that what goes wrong is told as it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from studies.retry import retry_timeout
from studies.storage_errors import StorageError, causes

Objective = Callable[[optuna.Trial], float | Sequence[float]]
Callback = Callable[[optuna.Study, FrozenTrial], None]

_log = logging.getLogger("layerskip.studies")


def optimize(
    study: optuna.Study,
    objective: Objective,
    *,
    timeout: float | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """``study.optimize``, but for three things.

    - Where storing a trial fails, or Ctrl-C falls into it, that is raised, not what Optuna stumbles over next.
    - A trial that was taken for dead while this process slept, as on a closed laptop, is given up: it is queued again
      already. So is one that another worker took at the same moment and finished first. Optuna would end the search.
    - The timeout is measured on a clock that does not jump.

    Args:
        study: The study.
        objective: Returns a trial's value or values.
        timeout: Seconds after which no new trial starts; None for no limit.
        callbacks: Called after each trial; one of them calls ``study.stop()``.

    Raises:
        StorageError: The study's storage cannot be used any more.
    """
    began = time.monotonic()

    def time_is_up() -> bool:
        return timeout is not None and time.monotonic() - began >= timeout

    def stop_in_time(study: optuna.Study, _: FrozenTrial) -> None:
        if time_is_up():
            study.stop()

    with retry_timeout():
        while not time_is_up():
            watched = _Watched(objective)
            try:
                study.optimize(watched, callbacks=[watched.told, *callbacks, stop_in_time])
            except Exception as error:
                watched.explain(study, error)
            else:
                return


class _Watched:
    """An objective that remembers which trial it was called for, and what it raised, until the trial is told."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._trial: optuna.Trial | None = None
        self._raised: BaseException | None = None

    def __call__(self, trial: optuna.Trial) -> float | Sequence[float]:
        self._trial, self._raised = trial, None
        try:
            return self._objective(trial)
        except BaseException as error:
            self._raised = error
            raise

    def told(self, _: optuna.Study, __: FrozenTrial) -> None:
        """Forget the trial: what goes wrong from now on has nothing to do with it."""
        self._trial = self._raised = None

    def explain(self, study: optuna.Study, error: Exception) -> None:
        """Raise what really went wrong; return if the trial was but taken for dead."""
        for kind in (KeyboardInterrupt, StorageError):
            for cause in (*causes(self._raised), *causes(error)):
                if isinstance(cause, kind):
                    raise cause
        if self._raised is not None and not isinstance(self._raised, (UpdateFinishedTrialError, optuna.TrialPruned)):
            raise self._raised
        if not self._given_up(study):
            raise error

    def _given_up(self, study: optuna.Study) -> bool:
        if self._trial is None:
            return False
        number = self._trial.number
        state = study.get_trials(deepcopy=False)[number].state
        if state == TrialState.FAIL:
            _log.warning("trial %d was taken for dead while this process stood still; going on with the next", number)
        # SQLite locks no rows: two workers may have taken the same waiting trial, and the other was quicker.
        return state.is_finished()
