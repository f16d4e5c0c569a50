"""The loop that runs a study's trials, in one of several processes that may share it."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from studies.heartbeats import Heartbeats
from studies.ranking import REVISITS_KEY, SOURCE_KEY
from studies.storage_errors import StorageError, causes

Objective = Callable[[optuna.Trial], float]

_log = logging.getLogger("layerskip.studies")


def run_trials(
    study: optuna.Study, objective: Objective, heartbeats: Heartbeats, *, timeout: float | None = None
) -> Iterator[FrozenTrial]:
    """Run trials one after another, until the caller takes no more or the time is up.

    Trials of workers that died are queued again, once, and so is a trial that Ctrl-C interrupts. A trial that another
    worker finished meanwhile, because this process was suspended and its trial taken for dead, is not yielded.

    Args:
        study: The study.
        objective: Returns a trial's value.
        heartbeats: Of the study's storage.
        timeout: Seconds after which no new trial starts; None for no limit.

    Yields:
        Each trial that this process finished.

    Raises:
        StorageError: The study's storage cannot be used any more.
        Exception: The objective's own error; its trial has failed.
    """
    began = time.monotonic()
    while timeout is None or time.monotonic() - began < timeout:
        _requeue_stale_trials(study, heartbeats)
        trial = study.ask()
        finished = _run(study, trial, objective, heartbeats)
        if finished is None:
            _log.warning("trial %d was finished by another worker; continuing with the next", trial.number)
        else:
            yield finished


def _run(study: optuna.Study, trial: optuna.Trial, objective: Objective, heartbeats: Heartbeats) -> FrozenTrial | None:
    """Run a trial and store its result; None if another worker finished it meanwhile."""
    value: float | None
    state: TrialState | None
    try:
        with heartbeats.beating(study.study_name, trial.number):
            value, state = objective(trial), None
    except optuna.TrialPruned:
        value, state = None, TrialState.PRUNED
    except BaseException as error:
        if isinstance(error, UpdateFinishedTrialError) and _is_finished(study, trial):
            return None
        with contextlib.suppress(StorageError, UpdateFinishedTrialError):
            if isinstance(error, KeyboardInterrupt):
                _requeue(study, trial)
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        for cause in causes(error):  # what Ctrl-C makes an objective store may fail in turn
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
        raise
    try:
        return None if _is_finished(study, trial) else study.tell(trial, value, state)
    except UpdateFinishedTrialError:
        return None


def _requeue(study: optuna.Study, trial: optuna.Trial) -> None:
    """Let a resumed study try what an interrupted trial was to try."""
    attributes = {SOURCE_KEY: f"interrupted trial {trial.number}"}
    attributes |= {key: trial.user_attrs[key] for key in (SOURCE_KEY, REVISITS_KEY) if key in trial.user_attrs}
    # An enqueued trial that was interrupted while it chose has chosen in part only.
    chosen = study.get_trials(deepcopy=False)[trial.number].system_attrs.get("fixed_params", trial.params)
    if chosen:
        study.enqueue_trial(chosen, user_attrs=attributes)


def _is_finished(study: optuna.Study, trial: optuna.Trial) -> bool:
    return study.get_trials(deepcopy=False)[trial.number].state.is_finished()


def _requeue_stale_trials(study: optuna.Study, heartbeats: Heartbeats) -> None:
    for number in heartbeats.stale_trials(study):
        if not heartbeats.claim(study.study_name, number):  # another worker does it
            continue
        try:
            dead = study.tell(number, state=TrialState.FAIL)
        except (ValueError, UpdateFinishedTrialError):  # it is finished by now
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            RetryHeartbeatStaleTrialCallback(max_retry=1)(study, dead)
