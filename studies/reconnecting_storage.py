"""What Optuna storages over a connection have in common: they outlive the loss of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection
from optuna.trial import TrialState

from studies.records import Records
from studies.retry import retry_timeout
from studies.storage_errors import StorageError

T = TypeVar("T")

# Reads, and writes that may be done twice: doing one again after it was committed unheard changes nothing. The
# exceptions are new trials: one that was made unheard stays behind, queued (its candidate is then measured twice) or
# running, where it is soon taken for dead and queued once. Deleting a study, as the dashboard does, is left to Optuna.
_OPERATIONS = (
    "create_new_trial",
    "get_all_studies",
    "get_all_trials",
    "get_best_trial",
    "get_study_directions",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_system_attrs",
    "get_study_user_attrs",
    "get_trial",
    "get_trial_id_from_study_id_trial_number",
    "set_study_system_attr",
    "set_study_user_attr",
    "set_trial_intermediate_value",
    "set_trial_param",
    "set_trial_system_attr",
    "set_trial_user_attr",
)
# What a heartbeat may be late by, beside the interval: the databases' clocks show whole seconds.
_HEARTBEAT_SLACK_SECONDS = 1.0


class ReconnectingStorage(BaseStorage, BaseHeartbeat):
    """Goes before an Optuna storage in a class's bases. Its errors are :class:`StorageError`, of one line."""

    @property
    def records(self) -> Records:
        """The measurements beside the studies."""
        raise NotImplementedError

    def retry_on_disconnect(self, operation: Callable[[bool], T]) -> T:
        """Do an operation, again where the connection was lost; it is told whether it may have been done before.

        Raises:
            StorageError: The storage refused, or was away for longer than patience lasts.
        """
        raise NotImplementedError

    def silent_trial_ids(self, study_id: int) -> list[int]:
        """Ids of a study's running trials that have not said for too long that they live."""
        raise NotImplementedError

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """Optuna's; a study that was made when the connection broke is not said to be another's."""
        plain: Callable[..., int] = self._plain("create_new_study")

        def create(repeated: bool) -> int:
            try:
                return plain(directions, study_name)
            except DuplicatedStudyError:
                if repeated and study_name is not None:
                    return self.get_study_id_from_name(study_name)
                raise

        return self.retry_on_disconnect(create)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Optuna's; a trial that was finished, or claimed, when the connection broke is not so twice.

        But of two workers that take a trial for dead while the connection breaks, each may believe that it was the one
        to say so, and the trial is then queued twice.
        """
        plain: Callable[..., bool] = self._plain("set_trial_state_values")

        def store(repeated: bool) -> bool:
            try:
                return plain(trial_id, state, values)
            except UpdateFinishedTrialError:
                if repeated and self._is_stored(trial_id, state, values):
                    return True
                raise

        return self.retry_on_disconnect(store)

    def _is_stored(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        trial = self.get_trial(trial_id)
        return trial.state == state and trial.values == (None if values is None else list(values))

    def record_heartbeat(self, trial_id: int) -> None:
        """Say that a trial lives, if the storage can be reached: the next heartbeat comes soon enough."""
        plain = self._plain("record_heartbeat")
        with retry_timeout(0), contextlib.suppress(StorageError):
            self.retry_on_disconnect(lambda _: plain(trial_id))

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """The trials to take for dead: those that are still silent after another heartbeat was due.

        Trials whose storage was away, or whose clock jumped, have said by then that they live.
        """
        silent = set(self.silent_trial_ids(study_id))
        interval = self.get_heartbeat_interval()
        if not silent or interval is None:
            return []
        time.sleep(interval + _HEARTBEAT_SLACK_SECONDS)
        return [trial_id for trial_id in self.silent_trial_ids(study_id) if trial_id in silent]

    def _plain(self, name: str) -> Callable[..., Any]:
        """The method of the storage that stands behind this class."""
        method: Callable[..., Any] = getattr(super(), name)
        return method


def _patient(name: str) -> Callable[..., Any]:
    def method(self: ReconnectingStorage, *arguments: Any, **options: Any) -> Any:
        plain = self._plain(name)
        return self.retry_on_disconnect(lambda _: plain(*arguments, **options))

    method.__name__ = name
    return method


for _name in _OPERATIONS:
    setattr(ReconnectingStorage, _name, _patient(_name))
