"""The database that studies live in: opening it, and outliving the loss of its connection."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote, unquote, urlsplit

from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random

from layerskip.errors import MissingDependencyError
from studies.heartbeats import Heartbeats
from studies.records import MeasurementTable, Table
from studies.retry import RETRY_SECONDS, RetryOnDisconnect
from studies.storage_errors import MALFORMED, NO_URL, StorageError, causes, redacted, storage_error

__all__ = [
    "ReconnectingStorage",
    "StorageError",
    "check_storage",
    "is_there",
    "open_existing_storage",
    "open_storage",
    "redacted",
]

P = ParamSpec("P")
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
# How long a process waits for another to have written: SQLite allows one write at a time.
_SQLITE_BUSY_SECONDS = 60


def _retried(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """That method of the wrapped storage, retried when the connection is lost."""

    def retried(self: ReconnectingStorage, /, *arguments: P.args, **options: P.kwargs) -> T:
        call: Callable[P, T] = getattr(self._backend, method.__name__)
        return self.retry(lambda _: call(*arguments, **options))

    return retried


class _Thread(threading.local):
    """What a thread is doing with a storage."""

    changes_state = False  # of a trial


class ReconnectingStorage(BaseStorage):
    """An Optuna storage that retries what a lost connection cut off; its errors are one-line :class:`StorageError`.

    Doing a write again that was committed without a reply changes nothing, but for new trials: the one whose
    reply was lost remains, queued (its candidate is then tried twice), or running without a heartbeat, and is then
    queued again.

    Attributes:
        engine: The database.
        retry: Runs operations on it.
        records: The measurements beside the studies.
        heartbeats: Of running trials.

    Args:
        database: Optuna's storage in that database.
        heartbeat_seconds: See :func:`open_storage`.
        retry_seconds: See :func:`open_storage`.
    """

    def __init__(self, database: RDBStorage, *, heartbeat_seconds: float, retry_seconds: float) -> None:
        self.engine = database.engine
        self.retry = RetryOnDisconnect(self.engine.url, retry_seconds)
        self.records = MeasurementTable(self.engine, self.retry)
        self.heartbeats = Heartbeats(self.engine, self.retry, heartbeat_seconds)
        self._thread = _Thread()
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "begin", self._lock_before_reading)
        self._backend = get_storage(database)  # with Optuna's cache of finished trials

    @property
    def is_read_only(self) -> bool:
        """Whether it is a SQLite file that this user may only read."""
        return self.engine.url.query.get("mode") == "ro"

    create_new_trial = _retried(BaseStorage.create_new_trial)
    get_all_studies = _retried(BaseStorage.get_all_studies)
    get_all_trials = _retried(BaseStorage.get_all_trials)
    get_study_directions = _retried(BaseStorage.get_study_directions)
    get_study_id_from_name = _retried(BaseStorage.get_study_id_from_name)
    get_study_name_from_id = _retried(BaseStorage.get_study_name_from_id)
    get_study_system_attrs = _retried(BaseStorage.get_study_system_attrs)
    get_study_user_attrs = _retried(BaseStorage.get_study_user_attrs)
    get_trial = _retried(BaseStorage.get_trial)
    set_study_system_attr = _retried(BaseStorage.set_study_system_attr)
    set_study_user_attr = _retried(BaseStorage.set_study_user_attr)
    set_trial_intermediate_value = _retried(BaseStorage.set_trial_intermediate_value)
    set_trial_param = _retried(BaseStorage.set_trial_param)
    set_trial_system_attr = _retried(BaseStorage.set_trial_system_attr)
    set_trial_user_attr = _retried(BaseStorage.set_trial_user_attr)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """As Optuna's; a study that was created when the connection was lost is not reported as another's."""

        def create(repeated: bool) -> int:
            try:
                return self._backend.create_new_study(directions, study_name)
            except DuplicatedStudyError:
                if repeated and study_name is not None:
                    return self._backend.get_study_id_from_name(study_name)
                raise

        return self.retry(create)

    def delete_study(self, study_id: int) -> None:
        """As Optuna's."""
        self._backend.delete_study(study_id)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's; a trial finished when the connection was lost is not reported as finished by another."""

        def store(repeated: bool) -> bool:
            self._thread.changes_state = True
            try:
                return self._backend.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if repeated and self._is_stored(trial_id, state, values):
                    return True
                raise
            finally:
                self._thread.changes_state = False

        return self.retry(store)

    def _lock_before_reading(self, connection: Connection) -> None:
        """Let a transaction that changes a trial's state read it when no other can change it any more.

        Optuna reads the state "for update", which SQLite does not know: two processes would both find a trial waiting,
        and both take it.
        """
        if self._thread.changes_state:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def _is_stored(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        trial = self._backend.get_trial(trial_id)
        return trial.state == state and trial.values == (None if values is None else list(values))


def open_storage(
    url: str, *, heartbeat_seconds: float = 10, retry_seconds: float = RETRY_SECONDS
) -> ReconnectingStorage:
    """Open the database that studies live in, creating its file and tables if need be.

    A SQLite file is put into write-ahead mode, which suits several processes and a trial's many small commits; one that
    this user may not change is opened for reading.

    Args:
        url: Such as ``sqlite:///layerskip.db`` or ``postgresql+psycopg://user@host/name``.
        heartbeat_seconds: Between heartbeats of a running trial. A trial that has been silent three times as long is
            taken for dead and queued again, once.
        retry_seconds: How long to retry each operation while the database's server is away.

    Raises:
        StorageError: The URL is malformed, or the database cannot be opened.
        MissingDependencyError: The driver for this kind of database is not installed.
    """
    driver = _parsed(url).get_driver_name
    # Several workers that create the tables of a new database at once trip over each other, each a time or two.
    attempts = Retrying(
        retry=retry_if_exception(_created_by_another),
        stop=stop_after_attempt(5),
        wait=wait_random(0.05, 0.5),
        reraise=True,
    )
    try:
        database = attempts(_open, url)
    except ImportError as error:
        extra = ": pip install 'layerskip[postgres]'" if driver() in ("psycopg", "psycopg2") else ""
        raise MissingDependencyError(
            f"storage '{redacted(url)}': the database driver is not installed; install '{driver()}'{extra}"
        ) from error
    except (SQLAlchemyError, StorageInternalError) as error:
        raise storage_error(url, error) from error
    return ReconnectingStorage(database, heartbeat_seconds=heartbeat_seconds, retry_seconds=retry_seconds)


def open_existing_storage(url: str) -> ReconnectingStorage:
    """Like :func:`open_storage`, but do not create a SQLite file.

    Raises:
        StorageError: Also if the SQLite file does not exist.
    """
    if not is_there(url):
        raise StorageError(f"storage '{redacted(url)}': no such file; search first, or name another with --storage")
    return open_storage(url)


def check_storage(url: str) -> None:
    """Check that a storage can be opened, and do not create a SQLite file.

    Raises:
        StorageError: It cannot be opened, or its file cannot be created.
        MissingDependencyError: As :func:`open_storage`.
    """
    if is_there(url):
        open_storage(url).engine.dispose()
        return
    folder = Path(_sqlite_file(_parsed(url)) or "").absolute().parent
    if not folder.is_dir():
        raise StorageError(f"storage '{redacted(url)}': cannot create the file: no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"storage '{redacted(url)}': cannot create the file: the folder {folder} is not writable")


def is_there(url: str) -> bool:
    """Whether there is a storage to open, as far as can be told without connecting: a SQLite file has to exist.

    Raises:
        StorageError: The URL is malformed.
    """
    file = _sqlite_file(_parsed(url))
    return not file or Path(file).exists()


def _open(url: str) -> RDBStorage:
    parsed = make_url(url)
    file = _sqlite_file(parsed)
    if file is not None and _is_read_only(Path(file)):
        parsed = _read_only(parsed, Path(file))
        return RDBStorage(_text(parsed), engine_kwargs=_engine_options(parsed), skip_table_creation=True)
    try:
        database = RDBStorage(url, engine_kwargs=_engine_options(parsed))
    except (RuntimeError, TypeError) as error:  # Optuna's, of a version, and drivers', of options
        raise storage_error(url, error) from error
    if file is not None:
        event.listen(database.engine, "connect", _write_ahead)
        database.engine.dispose()  # the connections made so far
    Table.metadata.create_all(database.engine)
    return database


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


def _created_by_another(error: BaseException) -> bool:
    """Whether a table could not be created because another worker was just creating it."""
    return any(
        isinstance(cause, IntegrityError)
        or (isinstance(cause, (OperationalError, ProgrammingError)) and "already exists" in str(cause.orig))
        for cause in causes(error)
    )


def _sqlite_file(url: URL) -> str | None:
    """The file of a SQLite database; None in memory, or for another kind of database."""
    name = url.database
    if url.get_backend_name() != "sqlite" or not name or ":memory:" in name or url.query.get("mode") == "memory":
        return None
    is_uri = name.startswith("file:") and url.query.get("uri") in ("true", "1")
    return unquote(urlsplit(name).path) if is_uri else name


def _is_read_only(file: Path) -> bool:
    """Whether there is a file that this user may not change; SQLite also writes beside it."""
    return file.exists() and not (os.access(file, os.W_OK) and os.access(file.absolute().parent, os.W_OK))


def _read_only(url: URL, file: Path) -> URL:
    """The URL by which SQLite reads a file without writing to it or beside it."""
    query = {**url.query, "mode": "ro", "uri": "true"}
    if not file.with_name(f"{file.name}-wal").exists():  # or it would make that file
        query["immutable"] = "1"
    return url.set(database=f"file:{quote(str(file.absolute()))}", query=query)


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except MALFORMED as error:
        raise StorageError(f"storage '{redacted(url)}': {NO_URL}") from error
