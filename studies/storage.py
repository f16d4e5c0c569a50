"""Opening the database that studies live in."""

from __future__ import annotations

import sqlite3
import warnings
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from layerskip.errors import LayerSkipError, MissingDependencyError
from studies.records import create_tables

_NO_URL = "not a database URL; expected one such as sqlite:///layerskip.db"
_MALFORMED = (ArgumentError, ValueError)  # a ValueError is a port that is no number


class StorageError(LayerSkipError):
    """A study's database cannot be opened, read or written."""


def open_storage(url: str, *, heartbeat_seconds: int = 10) -> RDBStorage:
    """Open the database of an Optuna storage URL, making it and its tables if need be.

    A SQLite file is put into write-ahead mode, where it bears several processes and a trial's many small commits.

    Args:
        url: Such as ``sqlite:///layerskip.db`` or ``postgresql+psycopg://user@host/name``.
        heartbeat_seconds: How often a running trial says that it lives. One that has been silent three times as long
            is taken for dead and tried once more.

    Raises:
        StorageError: The URL is malformed, or the database cannot be opened.
        MissingDependencyError: The driver for this kind of database is not installed.
    """
    parsed = _parsed(url)
    shown = redacted(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeat_interval
            storage = RDBStorage(
                url,
                heartbeat_interval=heartbeat_seconds,
                grace_period=3 * heartbeat_seconds,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
            )
        if _sqlite_file(parsed):
            event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()  # the connections made so far
        create_tables(storage.engine)
    except ImportError as error:
        driver = parsed.get_driver_name()
        extra = ": pip install 'layerskip[postgres]'" if driver in ("psycopg", "psycopg2") else ""
        raise MissingDependencyError(
            f"storage '{shown}': the database driver is not installed; install '{driver}'{extra}"
        ) from error
    except (SQLAlchemyError, RuntimeError) as error:
        raise StorageError(f"storage '{shown}': {_reason(error)}") from error
    return storage


def open_existing_storage(url: str) -> RDBStorage:
    """Like :func:`open_storage`, but do not make a SQLite file that is not there.

    Raises:
        StorageError: Also if the SQLite file does not exist.
    """
    file = _sqlite_file(_parsed(url))
    if file and not Path(file).exists():
        raise StorageError(f"storage '{redacted(url)}': no such file; search first, or name another with --storage")
    return open_storage(url)


def redacted(url: str) -> str:
    """A storage URL with its password replaced by stars."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except _MALFORMED:
        return "(malformed)"


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except _MALFORMED as error:
        raise StorageError(f"storage '(malformed)': {_NO_URL}") from error


def _sqlite_file(url: URL) -> str | None:
    """The file of a SQLite database; None in memory, or for another kind of database."""
    in_file = url.get_backend_name() == "sqlite" and url.database != ":memory:"
    return url.database if in_file else None


def _write_ahead(connection: sqlite3.Connection, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _reason(error: Exception) -> str:
    if isinstance(error, NoSuchModuleError):
        return "unknown kind of database"
    if isinstance(error, ArgumentError):
        return _NO_URL
    cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
    return str(cause).strip().splitlines()[0]
