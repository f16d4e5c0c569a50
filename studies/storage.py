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
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from layerskip.errors import LayerSkipError, MissingDependencyError
from studies.records import create_tables


class StorageError(LayerSkipError):
    """A study's database cannot be opened, read or written."""


def open_storage(url: str, *, heartbeat_seconds: int = 10) -> RDBStorage:
    """Open the database of an Optuna storage URL, making it and its tables if need be.

    A SQLite file is put into write-ahead mode, where it bears several processes and a trial's many small commits.

    Args:
        url: Such as ``sqlite:///layerskip.db`` or ``postgresql+psycopg2://user@host/name``.
        heartbeat_seconds: How often a running trial says that it lives. One that has been silent three times as long
            is taken for dead and tried once more.

    Raises:
        StorageError: The URL is malformed, or the database cannot be opened.
        MissingDependencyError: The driver for this kind of database is not installed.
    """
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
        if storage.engine.dialect.name == "sqlite":
            event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()
        create_tables(storage.engine)
    except ImportError as error:
        raise MissingDependencyError(
            f"storage '{shown}': the database driver is not installed ({error.name}); "
            "for PostgreSQL: pip install 'layerskip[postgres]'"
        ) from error
    except (SQLAlchemyError, RuntimeError) as error:
        raise StorageError(f"storage '{shown}': {_reason(error)}") from error
    return storage


def open_existing_storage(url: str) -> RDBStorage:
    """Like :func:`open_storage`, but do not make a SQLite file that is not there.

    Raises:
        StorageError: Also if the SQLite file does not exist.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        return open_storage(url)  # which says what is wrong with it
    file = parsed.database
    if parsed.get_backend_name() == "sqlite" and file and file != ":memory:" and not Path(file).exists():
        raise StorageError(f"storage '{redacted(url)}': no such file; search first, or name another with --storage")
    return open_storage(url)


def redacted(url: str) -> str:
    """A storage URL with its password replaced by stars."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "(malformed)"


def _write_ahead(connection: sqlite3.Connection, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _reason(error: Exception) -> str:
    if isinstance(error, ArgumentError):
        return "not a database URL; expected one such as sqlite:///layerskip.db"
    if isinstance(error, NoSuchModuleError):
        return "unknown kind of database"
    cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
    return str(cause).strip().splitlines()[0]
