"""Retrying a database operation whose connection was lost."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from studies.storage_errors import StorageError, causes, redacted, storage_error

T = TypeVar("T")

RETRY_SECONDS = 120.0
# After Ctrl-C, storing must not take long either.
_SECONDS_AFTER_CTRL_C = 1.0
_CTRL_C_LASTS_SECONDS = 10.0
_BACKOFF = wait_random_exponential(multiplier=0.2, max=3)
# PostgreSQL: a server that is shutting down, has crashed or is starting up. Class 08 is a broken connection.
_POSTGRESQL_AWAY = ("57P01", "57P02", "57P03")
# MySQL: too many connections, shutting down, cannot connect, gone away, lost in a query, lost while reading.
_MYSQL_AWAY = (1040, 1053, 2002, 2003, 2006, 2013, 2055)

_log = logging.getLogger("layerskip.studies")


class RetryOnDisconnect:
    """Runs a database operation, again for as long as its connection is lost and time allows.

    Ctrl-C ends the waiting, and for some seconds after it no operation waits longer than a moment.

    Args:
        url: Of the database, for messages.
        seconds: How long to keep trying, for each operation.
    """

    def __init__(self, url: URL, seconds: float) -> None:
        self._url = url
        self._seconds = seconds
        self._hurry_until = 0.0

    def __call__(self, operation: Callable[[bool], T]) -> T:
        """The operation's result.

        Args:
            operation: Gets whether it may have been done before: what was committed when the connection was lost stays
                committed, though its reply never arrived.

        Raises:
            StorageError: The database refused, or was away for too long.
        """
        began = monotonic()
        deadline = began + (_SECONDS_AFTER_CTRL_C if began < self._hurry_until else self._seconds)

        def warn_once(state: RetryCallState) -> None:
            if state.attempt_number == 1:
                seconds = deadline - monotonic()
                _log.warning("storage '%s' does not answer; retrying for up to %.0f s", redacted(self._url), seconds)

        attempts = Retrying(
            retry=retry_if_exception(_is_disconnect),
            stop=lambda _: monotonic() >= deadline,
            wait=_BACKOFF,
            before_sleep=warn_once,
            reraise=True,
        )
        repeated = iter((False,))
        try:
            return attempts(lambda: operation(next(repeated, True)))
        except (StorageInternalError, SQLAlchemyError) as error:
            raise storage_error(self._url, error) from error
        except KeyboardInterrupt:
            self._hurry_until = monotonic() + _CTRL_C_LASTS_SECONDS
            raise


def _is_disconnect(error: BaseException) -> bool:
    """Whether a database's server was away or went away, rather than refused."""
    # Ctrl-C, and the end of an inner operation's retrying, may have the lost connection in their context.
    if isinstance(error, StorageError) or not isinstance(error, Exception):
        return False
    return any(isinstance(cause, DBAPIError) and _lost_connection(cause) for cause in causes(error))


def _lost_connection(error: DBAPIError) -> bool:
    driver_error = error.orig
    if driver_error is None or isinstance(driver_error, sqlite3.Error):
        return False
    if error.connection_invalidated:
        return True
    if hasattr(driver_error, "sqlstate") or hasattr(driver_error, "pgcode"):
        code = getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)
        if code is None:  # no answer from a server, so the connection could not be made
            return isinstance(error, OperationalError)
        return code.startswith("08") or code in _POSTGRESQL_AWAY
    return bool(driver_error.args) and driver_error.args[0] in _MYSQL_AWAY
