"""How long a server is waited for, by a clock that only the operations move."""

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError
from tenacity import wait_none

from studies.retry import RETRY_SECONDS, RetryOnDisconnect
from studies.storage_errors import StorageError
from tests.postgres import PASSWORD

URL = make_url(f"postgresql+psycopg://me:{PASSWORD}@host/db")


class DriverError(Exception):
    """What a driver raises where no server answers: without a code."""

    sqlstate = None


def away():
    return OperationalError("SELECT 1", None, DriverError("no answer"))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock, as a list of one number."""
    clock = [100.0]
    monkeypatch.setattr("studies.retry.monotonic", lambda: clock[0])
    monkeypatch.setattr("studies.retry._BACKOFF", wait_none())
    return clock


@pytest.fixture
def seconds_spent(clock):
    """Tries an operation on a server that stays away, and returns how long it was retried."""

    def fail(_):
        clock[0] += 1
        raise away()

    def spend(retry):
        began = clock[0]
        with pytest.raises(StorageError, match=r"^storage 'postgresql\+psycopg://me:\*\*\*@host/db': no answer$"):
            retry(fail)
        return clock[0] - began

    return spend


def press_ctrl_c(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("seconds", [3, 10, RETRY_SECONDS])
def test_each_operation_is_retried_for_as_long_as_was_asked_for(seconds_spent, seconds):
    retry = RetryOnDisconnect(URL, seconds)
    assert [seconds_spent(retry), seconds_spent(retry)] == [seconds, seconds]


def test_an_operation_is_told_whether_it_may_have_been_done_before():
    told = []

    def operation(repeated):
        told.append(repeated)
        if len(told) < 3:
            raise away()
        return "done"

    assert RetryOnDisconnect(URL, 10)(operation) == "done"
    assert told == [False, True, True]


def test_what_a_server_refuses_is_not_retried(clock):
    def refused(_):
        clock[0] += 1
        refusal = DriverError("permission denied")
        refusal.sqlstate = "42501"
        raise OperationalError("SELECT 1", None, refusal)

    with pytest.raises(StorageError, match=r": permission denied$"):
        RetryOnDisconnect(URL, 10)(refused)
    assert clock == [101.0]


def test_after_ctrl_c_operations_wait_a_second_at_most_and_later_as_long_as_before(clock, seconds_spent):
    retry = RetryOnDisconnect(URL, RETRY_SECONDS)
    with pytest.raises(KeyboardInterrupt):
        retry(press_ctrl_c)
    assert [seconds_spent(retry), seconds_spent(retry)] == [1, 1]
    clock[0] += 10
    assert seconds_spent(retry) == RETRY_SECONDS


@pytest.mark.parametrize("final", [KeyboardInterrupt(), StorageError("storage 's': away for too long")])
def test_what_ends_the_retrying_ends_it_also_while_a_lost_connection_is_handled(clock, final):
    calls = []

    def fail(repeated):
        calls.append(repeated)
        clock[0] += 1
        try:
            raise away()
        except OperationalError:
            raise final  # noqa: B904 - its context is the lost connection

    with pytest.raises(type(final)):
        RetryOnDisconnect(URL, 10)(fail)
    assert calls == [False]


def test_what_is_waited_for_is_logged_once_without_its_password(clock, caplog):
    def operation(_):
        clock[0] += 1
        if clock[0] < 105:
            raise away()

    RetryOnDisconnect(URL, RETRY_SECONDS)(operation)
    assert caplog.messages == [
        "storage 'postgresql+psycopg://me:***@host/db' does not answer; retrying for up to 119 s"
    ]
