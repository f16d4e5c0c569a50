"""The machine lock: real processes that predict side by side, and measure alone."""

import fcntl
import multiprocessing

import pytest
import torch

from layerskip.errors import LayerSkipError
from search.machine_lock import MachineLock

CPU = torch.device("cpu")
PREDICT, MEASURE = "shared", "exclusive"


def take_turns(folder, orders):
    """Take the lock as ordered, say so, and release it when ordered."""
    lock = MachineLock(folder, CPU)
    while True:
        kind = orders.recv()
        orders.send("waits")
        with getattr(lock, kind)():
            orders.send("in")
            orders.recv()
        orders.send("out")


class Worker:
    """A process that takes the lock as ordered."""

    def __init__(self, folder):
        context = multiprocessing.get_context("fork")  # importing torch anew would take seconds
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=take_turns, args=(folder, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, kind):
        self._orders.send(kind)
        assert self.says() == "waits"

    def end(self):
        self._orders.send("done")
        assert self.says() == "out"

    def says(self):
        assert self._orders.poll(60), "it never came in"
        return self._orders.recv()

    def waits(self):
        """Whether it says nothing for a moment."""
        return not self._orders.poll(0.2)

    def kill(self):
        self._process.kill()
        self._process.join()


@pytest.fixture
def workers(tmp_path):
    started = [Worker(tmp_path) for _ in range(3)]
    yield started
    for worker in started:
        worker.kill()


def test_predictions_run_side_by_side(workers):
    for worker in workers:
        worker.begin(PREDICT)
        assert worker.says() == "in"
    for worker in workers:
        worker.end()


def test_a_measurement_has_the_machine_to_itself(workers):
    measuring, predicting, other = workers
    measuring.begin(MEASURE)
    assert measuring.says() == "in"
    predicting.begin(PREDICT)
    other.begin(MEASURE)
    assert predicting.waits()
    assert other.waits()
    measuring.end()
    first, second = (other, predicting) if predicting.waits() else (predicting, other)
    assert first.says() == "in"
    assert second.waits()
    first.end()
    assert second.says() == "in"
    second.end()


def test_a_measurement_waits_for_running_predictions_and_new_ones_wait_for_it(workers):
    running, measuring, new = workers
    running.begin(PREDICT)
    assert running.says() == "in"
    measuring.begin(MEASURE)
    assert measuring.waits()
    new.begin(PREDICT)
    assert new.waits()  # or predictions that take turns would keep the measurement waiting for ever
    running.end()
    assert measuring.says() == "in"
    assert new.waits()
    measuring.end()
    assert new.says() == "in"
    new.end()


def test_a_process_with_the_exclusive_lock_can_take_it_again(workers, tmp_path):
    lock = MachineLock(tmp_path, CPU)
    with lock.exclusive():
        with lock.exclusive():
            pass
        workers[0].begin(PREDICT)
        assert workers[0].waits()
    assert workers[0].says() == "in"
    with pytest.raises(BlockingIOError), lock._room.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_lock_of_a_killed_process_is_released(workers):
    killed, other, _ = workers
    killed.begin(MEASURE)
    assert killed.says() == "in"
    other.begin(PREDICT)
    assert other.waits()
    killed.kill()
    assert other.says() == "in"


@pytest.mark.parametrize(("workers", "expected"), [(1, 4), (2, 2), (3, 1), (9, 1)])
def test_workers_share_the_processors_threads_while_none_measures(tmp_path, workers, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        lock = MachineLock(tmp_path, CPU, workers=workers)
        with lock.shared():
            assert torch.get_num_threads() == expected
        with lock.exclusive():
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_the_lock_is_released_on_an_error_too(tmp_path):
    lock = MachineLock(tmp_path, CPU)
    for turn in (lock.exclusive, lock.shared, lock.exclusive):
        with pytest.raises(KeyboardInterrupt), turn():
            raise KeyboardInterrupt


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LayerSkipError) as caught:
        MachineLock(tmp_path / "file" / "below", CPU)
    assert str(caught.value).startswith(f"{tmp_path}/file/below: ")
    assert "LAYERSKIP_CACHE" in str(caught.value)
    assert "\n" not in str(caught.value)
