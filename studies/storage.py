"""Open the database that studies live in."""

from __future__ import annotations

import random
import time
from pathlib import Path

from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from layerskip.errors import MissingDependencyError
from studies.database import DatabaseStorage, sqlite_file
from studies.records import create_tables
from studies.storage_errors import MALFORMED, NO_URL, StorageError, causes, redacted, storage_error

__all__ = ["StorageError", "is_there", "open_existing_storage", "open_storage", "redacted"]

# Several workers that make the tables of a new database at once trip over each other, each a time or two.
_TRIES_TO_MAKE_TABLES = 5


def open_storage(url: str, *, heartbeat_seconds: int = 10) -> DatabaseStorage:
    """Open an Optuna storage URL, making the database's file and tables if need be.

    A SQLite file is put into write-ahead mode, where it bears several processes and a trial's many small commits. A
    database server that goes away later is waited for.

    Args:
        url: Such as ``sqlite:///layerskip.db`` or ``postgresql+psycopg://user@host/name``.
        heartbeat_seconds: How often a running trial says that it lives. One that has been silent three times as long
            is taken for dead and tried once more.

    Raises:
        StorageError: The URL is malformed, or the database cannot be opened.
        MissingDependencyError: The driver for this kind of storage is not installed.
    """
    parsed = _parsed(url)
    try:
        return _open(url, heartbeat_seconds)
    except ImportError as error:
        driver = parsed.get_driver_name()
        extra = ": pip install 'layerskip[postgres]'" if driver in ("psycopg", "psycopg2") else ""
        raise MissingDependencyError(
            f"storage '{redacted(url)}': the database driver is not installed; install '{driver}'{extra}"
        ) from error
    except (SQLAlchemyError, StorageInternalError) as error:
        raise storage_error(url, error) from error


def open_existing_storage(url: str) -> DatabaseStorage:
    """Like :func:`open_storage`, but do not make a SQLite file that is not there.

    Raises:
        StorageError: Also if the SQLite file does not exist.
    """
    if not is_there(url):
        raise StorageError(f"storage '{redacted(url)}': no such file; search first, or name another with --storage")
    return open_storage(url)


def is_there(url: str) -> bool:
    """Whether there is a storage to open, as far as that can be told without a try: a SQLite file has to exist.

    Raises:
        StorageError: The URL is malformed.
    """
    file = sqlite_file(_parsed(url))
    return not file or Path(file).exists()


def _open(url: str, heartbeat_seconds: int) -> DatabaseStorage:
    for tries_left in reversed(range(_TRIES_TO_MAKE_TABLES)):
        try:
            storage = DatabaseStorage(url, heartbeat_seconds=heartbeat_seconds)
            create_tables(storage.engine)
            break
        except (SQLAlchemyError, StorageInternalError) as error:
            if not tries_left or not _made_by_another(error):
                raise
            time.sleep(random.uniform(0.05, 0.5))
    return storage


def _made_by_another(error: Exception) -> bool:
    """Whether a table could not be made because another worker was just making it."""
    return any(
        isinstance(cause, IntegrityError)
        or (isinstance(cause, (OperationalError, ProgrammingError)) and "already exists" in str(cause.orig))
        for cause in causes(error)
    )


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except MALFORMED as error:
        raise StorageError(f"storage '(malformed)': {NO_URL}") from error
