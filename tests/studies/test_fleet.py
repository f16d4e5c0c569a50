"""Many workers on one study, some of which are killed, and servers that go away and come back."""

import os
import signal
import threading
import time

import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from studies.storage import open_storage
from studies.storage_errors import StorageError
from studies.trial_loop import run_trials
from tests.studies.worker import fleet, measurement

pytestmark = pytest.mark.timeout(120)
AWAY_SECONDS = 3


@pytest.fixture
def workers():
    with fleet() as workers:
        yield workers


@pytest.fixture(params=["sqlite", "postgresql"])
def shared(request, database):
    """The URL of a storage that several processes can use."""
    return database if request.param == "sqlite" else request.getfixturevalue("postgresql_url")


def trials_of(url):
    return optuna.load_study(study_name="s", storage=open_storage(url)).trials


def measured_trials(url):
    return sorted(record.trial for record in open_storage(url).records.of("s"))


def assert_all_finished_once(url, workers, count):
    trials = trials_of(url)
    assert [trial.number for trial in trials] == list(range(count))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert workers.numbers("finished") == measured_trials(url) == list(range(count))


@pytest.mark.slow
def test_four_workers_that_start_at_once_on_an_empty_storage_lose_no_trial_and_do_none_twice(shared, workers):
    for _ in range(4):
        workers.start(shared, 10)
    workers.wait()
    assert_all_finished_once(shared, workers, 40)


@pytest.mark.slow
def test_a_killed_workers_trial_is_tried_again_exactly_once_by_the_others(shared, workers):
    victim = workers.start(shared, 10, stand_still_at=1)
    workers.wait_for("began", 2)
    victim.kill()
    victim.join()
    for _ in range(2):
        workers.start(shared, 8, seconds=1)
    workers.wait()
    [killed] = [trial for trial in trials_of(shared) if trial.state == TrialState.FAIL]
    assert killed.number == 1
    [retry] = [t for t in trials_of(shared) if RetryHeartbeatStaleTrialCallback.retried_trial_number(t) is not None]
    assert RetryHeartbeatStaleTrialCallback.retried_trial_number(retry) == killed.number
    assert (retry.state, retry.params) == (TrialState.COMPLETE, killed.params)
    finished = [trial.number for trial in trials_of(shared) if trial.state == TrialState.COMPLETE]
    assert len(finished) == 1 + 2 * 8
    assert measured_trials(shared) == finished


@pytest.mark.slow
def test_a_trial_whose_worker_died_before_its_first_heartbeat_is_tried_again(shared):
    storage = open_storage(shared, heartbeat_seconds=1)
    study = optuna.create_study(study_name="s", storage=storage)
    study.enqueue_trial({"x": 0.25})
    study.ask()  # and nothing more, as if killed right here
    assert storage.heartbeats.silent_trials(study) == set()  # counts from now on
    time.sleep(4.5)
    next(run_trials(study, lambda trial: trial.suggest_float("x", 0, 1), storage.heartbeats))
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[1].params == {"x": 0.25}


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_workers_wait_for_a_restarted_postgresql_and_lose_nothing(postgresql, postgresql_url, workers, how, driver):
    pytest.importorskip(driver)
    url = postgresql_url.replace("+psycopg:", f"+{driver}:")
    for _ in range(2):
        workers.start(url, 15, seconds=0.2)
    workers.wait_for("finished", 6)
    postgresql.stop(how)
    time.sleep(AWAY_SECONDS)
    postgresql.start()
    workers.wait()
    assert_nothing_lost(url, workers, 30)


def assert_nothing_lost(url, workers, count):
    """Every trial that a worker finished is there with its measurement, once.

    A trial that was made when the connection broke may stay behind, never begun by anybody.
    """
    finished = workers.numbers("finished")
    trials = trials_of(url)
    assert len(finished) == len(set(finished)) == count
    assert [trial.number for trial in trials if trial.state == TrialState.COMPLETE] == finished
    assert measured_trials(url) == finished
    assert [trial.number for trial in trials] == list(range(len(trials)))
    left = [trial for trial in trials if trial.state != TrialState.COMPLETE]
    assert not {trial.number for trial in left} & set(workers.numbers("began"))


def test_a_server_that_stays_away_is_an_error_in_one_line_and_then_the_storage_can_be_used_again(
    postgresql, postgresql_url
):
    storage = open_storage(postgresql_url, retry_seconds=0.5)
    study = optuna.create_study(study_name="s", storage=storage)
    postgresql.stop()
    try:
        for operation in (study.ask, lambda: storage.records.add(measurement("s", 0, 1.0))):
            with pytest.raises(StorageError) as caught:
                operation()
            assert str(caught.value).startswith("storage 'postgresql+psycopg://me:***@127.0.0.1:")
            assert "\n" not in str(caught.value)
    finally:
        postgresql.start()
    storage.records.add(measurement("s", study.ask().number, 1.0))
    assert (len(study.trials), len(storage.records.of("s"))) == (1, 1)


def test_a_heartbeat_does_not_wait_for_a_server_that_is_away(postgresql, postgresql_url):
    storage = open_storage(postgresql_url)
    trial = optuna.create_study(study_name="s", storage=storage).ask()
    postgresql.stop()
    try:
        beat = threading.Thread(target=storage.heartbeats.record, args=("s", trial.number), daemon=True)
        beat.start()
        beat.join(timeout=60)
        assert not beat.is_alive()  # nor did it raise, which pytest would tell
    finally:
        postgresql.start()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_waiting_for_a_server_at_once(postgresql, postgresql_url):
    """Well within the two minutes that each operation would be retried for, or this test times out."""
    storage = open_storage(postgresql_url, heartbeat_seconds=1)
    study = optuna.create_study(study_name="s", storage=storage)

    def objective(trial):
        postgresql.stop()
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        trial.set_user_attr("key", "value")

    try:
        with pytest.raises(KeyboardInterrupt):
            next(run_trials(study, objective, storage.heartbeats))
    finally:
        postgresql.start()
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]  # until it is taken for dead
