"""Studies in a database: Optuna's storage, with connections that suit the kind of database."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from studies.reconnecting_storage import ReconnectingStorage
from studies.records import TableOfRecords
from studies.retry import retry_on_disconnect, wait_for_server
from studies.storage_errors import storage_error

T = TypeVar("T")

# A server that vanishes without a word, as one does whose machine loses power, is noticed within a minute.
_KEEPALIVE = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
# How long one process waits for another to have written: SQLite lets one write at a time.
_SQLITE_BUSY_SECONDS = 60
_RUNNING_UNHEARD = sqlalchemy.text(
    "SELECT trials.trial_id FROM trials LEFT JOIN trial_heartbeats ON trial_heartbeats.trial_id = trials.trial_id "
    "WHERE trials.study_id = :study AND trials.state = 'RUNNING' AND trial_heartbeats.trial_id IS NULL"
)


class DatabaseStorage(ReconnectingStorage, RDBStorage):
    """Optuna's storage in a database; waits for a server that is away, and takes up with it where it was.

    Args:
        url: An Optuna storage URL.
        heartbeat_seconds: How often a running trial says that it lives. One that has been silent three times as long
            is taken for dead and tried once more.

    Raises:
        StorageError: The database is of another version of Optuna, or its driver does not know an option.
    """

    def __init__(self, url: str, *, heartbeat_seconds: int) -> None:
        options = _engine_options(make_url(url))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeat_interval
            try:
                super().__init__(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=heartbeat_seconds,
                    grace_period=3 * heartbeat_seconds,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
                )
            except (RuntimeError, TypeError) as error:  # Optuna's, of a version, and drivers', of options
                raise storage_error(url, error) from error
        self._set_up_engine()

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._set_up_engine()

    def _set_up_engine(self) -> None:
        if self.engine.dialect.name != "sqlite":
            wait_for_server(self.engine)
        elif sqlite_file(self.engine.url):
            event.listen(self.engine, "connect", _write_ahead)
            self.engine.dispose()  # the connections made so far

    @property
    def records(self) -> TableOfRecords:
        """The measurements beside the studies, in a table of the same database."""
        return TableOfRecords(self.engine)

    def retry_on_disconnect(self, operation: Callable[[bool], T]) -> T:
        try:
            return retry_on_disconnect(operation)
        except (StorageInternalError, SQLAlchemyError) as error:
            raise storage_error(self.engine.url, error) from error

    def silent_trial_ids(self, study_id: int) -> list[int]:
        """Ids of a study's running trials that have not said for too long that they live.

        A trial that never did, because its worker died or lost its connection right at the start, counts from now on.
        """
        for trial_id in self.retry_on_disconnect(lambda _: self._unheard_trial_ids(study_id)):
            self.record_heartbeat(trial_id)
        return self.retry_on_disconnect(lambda _: RDBStorage._get_stale_trial_ids(self, study_id))

    def _unheard_trial_ids(self, study_id: int) -> list[int]:
        with self.engine.connect() as connection:
            return list(connection.scalars(_RUNNING_UNHEARD, {"study": study_id}))

    # Optuna's cache goes past the public methods to these.

    def _create_new_trial(self, *arguments: Any, **options: Any) -> Any:
        return self.retry_on_disconnect(lambda _: RDBStorage._create_new_trial(self, *arguments, **options))

    def _set_trial_param(self, *arguments: Any, **options: Any) -> None:
        self.retry_on_disconnect(lambda _: RDBStorage._set_trial_param(self, *arguments, **options))

    def _get_trials(self, *arguments: Any, **options: Any) -> Any:
        return self.retry_on_disconnect(lambda _: RDBStorage._get_trials(self, *arguments, **options))

    def _get_best_trial_id(self, *arguments: Any, **options: Any) -> Any:
        return self.retry_on_disconnect(lambda _: RDBStorage._get_best_trial_id(self, *arguments, **options))


def sqlite_file(url: URL) -> str | None:
    """The file of a SQLite database; None in memory, or for another kind of database."""
    in_file = url.get_backend_name() == "sqlite" and url.database != ":memory:"
    return url.database if in_file else None


def _engine_options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": _SQLITE_BUSY_SECONDS}} if "timeout" not in url.query else {}
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.get_driver_name() in ("psycopg", "psycopg2"):
        options["connect_args"] = {name: value for name, value in _KEEPALIVE.items() if name not in url.query}
    return options


def _write_ahead(connection: sqlite3.Connection, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
