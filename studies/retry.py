"""Patience with a server that is away: waiting for it, and doing again what the loss of the connection cut off."""

from __future__ import annotations

import itertools
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any, TypeVar

from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError, OperationalError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from studies.storage_errors import StorageError, causes, redacted

T = TypeVar("T")
V = TypeVar("V")

PATIENCE_SECONDS = 120.0
_HURRY_SECONDS = 1.0
_BACKOFF = wait_random_exponential(multiplier=0.2, max=3)
# PostgreSQL: a server that is shutting down, has crashed or is starting up. Class 08 is a broken connection.
_POSTGRESQL_AWAY = ("57P01", "57P02", "57P03")
# MySQL: too many connections, shutting down, cannot connect, gone away, lost in a query, lost while reading.
_MYSQL_AWAY = (1040, 1053, 2002, 2003, 2006, 2013, 2055)

_patience: ContextVar[float] = ContextVar("patience", default=PATIENCE_SECONDS)
# When, on the monotonic clock, patience with the operation that is under way ends; None between operations.
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
_log = logging.getLogger("layerskip.studies")


def retry_timeout(seconds: float | None = None) -> AbstractContextManager[None]:
    """Wait at most so long for a server in each operation, in this thread.

    Args:
        seconds: None for as long as now. Either way, what Ctrl-C leaves of it is forgotten at the end of the block.
    """
    return _set(_patience, _patience.get() if seconds is None else seconds)


@contextmanager
def _set(variable: ContextVar[V], value: V) -> Iterator[None]:
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def is_disconnect(error: BaseException) -> bool:
    """Whether an error of a database means that its server was away or went away, not that it refused."""
    if isinstance(error, StorageError) or not isinstance(error, Exception):  # patience with it is over
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


def retry_on_disconnect(
    operation: Callable[[bool], T],
    is_disconnect: Callable[[BaseException], bool] = is_disconnect,
    *,
    awaited: str | None = None,
) -> T:
    """Do an operation, and again for as long as it fails for a lost connection and patience lasts.

    Args:
        operation: Told whether it may have been done before: what was committed when the connection broke stands,
            though nobody heard of it.
        lost: Whether an error means that the connection was lost.
        awaited: What to tell the user is waited for; None where connecting tells it.

    Raises:
        Exception: What the operation raised last.
    """
    times = itertools.count()
    try:
        return _retry(lambda: operation(next(times) > 0), is_disconnect, awaited)
    except KeyboardInterrupt:  # nor does who pressed Ctrl-C want to wait for what is stored because of it
        if _patience.get(None) is not None:  # in a block of patience, after which it is forgotten
            _patience.set(min(_HURRY_SECONDS, _patience.get()))
        raise


def wait_for_server(engine: Engine) -> None:
    """Make an engine's new connections wait for a server that is away.

    Only for an engine that has connected before: a wrong password looks like a server that is away.
    """

    def connect(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
        refused = dialect.loaded_dbapi.OperationalError
        return _retry(lambda: dialect.connect(*arguments, **options), lambda error: isinstance(error, refused), awaited)

    awaited = redacted(engine.url)
    event.listen(engine, "do_connect", connect)


def _retry(operation: Callable[[], T], is_disconnect: Callable[[BaseException], bool], awaited: str | None) -> T:
    """Do an operation, and again; the waiting within it ends with its own."""
    around = _deadline.get()
    deadline = monotonic() + _patience.get() if around is None else around

    def is_over(_: RetryCallState) -> bool:
        return monotonic() >= deadline

    def say_once(state: RetryCallState) -> None:
        if state.attempt_number == 1 and awaited is not None:
            _log.warning("storage '%s' does not answer; waiting for at most %.0f s", awaited, deadline - monotonic())

    retry = retry_if_exception(is_disconnect)
    attempts = Retrying(retry=retry, stop=is_over, wait=_BACKOFF, before_sleep=say_once, reraise=True)
    with _set(_deadline, deadline):
        return attempts(operation)
