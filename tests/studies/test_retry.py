"""How long a server is waited for, by a clock that only the operations move."""

import optuna
import pytest
from tenacity import wait_none

from studies.optimizing import optimize
from studies.retry import PATIENCE_SECONDS, retry_on_disconnect, retry_timeout


class AwayError(Exception):
    """A server is away."""


def is_disconnect(error):
    return isinstance(error, AwayError)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock, as a list of one number."""
    clock = [0.0]
    monkeypatch.setattr("studies.retry.monotonic", lambda: clock[0])
    monkeypatch.setattr("studies.retry._BACKOFF", wait_none())
    return clock


@pytest.fixture
def spent(clock):
    """Tries an operation on a server that stays away, and says how long it was waited for."""

    def fail(_):
        clock[0] += 1
        raise AwayError

    def spend():
        began = clock[0]
        with pytest.raises(AwayError):
            retry_on_disconnect(fail, is_disconnect)
        return clock[0] - began

    return spend


def press_ctrl_c(_):
    raise KeyboardInterrupt


def test_each_operation_has_the_patience_of_the_block_that_it_is_in(spent):
    assert spent() == PATIENCE_SECONDS
    with retry_timeout(10):
        assert [spent(), spent()] == [10, 10]
        with retry_timeout(3):
            assert spent() == 3
    assert spent() == PATIENCE_SECONDS


def test_patience_is_spent_once_however_deep_the_waiting_is(clock, spent):
    def operation(repeated):
        if repeated:
            assert spent() == 6
        clock[0] += 4
        raise AwayError

    with retry_timeout(10), pytest.raises(AwayError):
        retry_on_disconnect(operation, is_disconnect)
    assert clock[0] == 14  # the second time, the operation itself takes another four


def test_ctrl_c_shortens_patience_to_the_end_of_the_block(spent):
    with retry_timeout(10):
        with pytest.raises(KeyboardInterrupt):
            retry_on_disconnect(press_ctrl_c)
        assert spent() == 1
    assert spent() == PATIENCE_SECONDS


def test_ctrl_c_outside_of_a_block_shortens_no_patience(spent):
    with pytest.raises(KeyboardInterrupt):
        retry_on_disconnect(press_ctrl_c)
    assert spent() == PATIENCE_SECONDS


def test_ctrl_c_in_one_search_leaves_the_patience_of_the_next_alone(spent):
    with pytest.raises(KeyboardInterrupt):
        optimize(optuna.create_study(), lambda trial: retry_on_disconnect(press_ctrl_c))
    assert spent() == PATIENCE_SECONDS


def test_what_is_waited_for_is_told_once(clock, caplog):
    def operation(_):
        clock[0] += 1
        if clock[0] < 5:
            raise AwayError

    retry_on_disconnect(operation, is_disconnect, awaited="host")
    assert caplog.messages == ["storage 'host' does not answer; waiting for at most 119 s"]
