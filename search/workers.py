"""Worker processes: several processes work on one study; the first also plans what is tried, and reports."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType

import optuna
import torch

from layerskip.engine import Engine
from layerskip.errors import LayerSkipError, out_of_memory
from search import worker_process
from search.draft_layers import TrainedDraftLayer
from search.search import Search
from search.search_task import SearchTask
from studies.storage import open_storage

# A worker may be in the middle of a long pass when it is asked to end; if it takes longer than this, it is killed.
_SECONDS_TO_END = 10.0

# Loads a model with its engine, and the trained draft layers that a search may use; called in the worker.
Load = Callable[[], tuple[Engine, Sequence[TrainedDraftLayer]]]


@dataclass(frozen=True)
class Work:
    """All that a worker needs; it can be sent to another process."""

    load: Load
    task: SearchTask
    storage: str
    threads: int
    verbosity: int


class Workers(AbstractContextManager["Workers"]):
    """Processes that join a search when entered and are waited for at the end.

    A worker that is killed loses nothing but the trial that it was running, which is tried once more; the others
    continue. An error, or Ctrl-C, in the first process ends them all, and the trials that they were running are tried
    again when the study is resumed.

    No trial is taken twice: what is enqueued goes to one worker alone. Two workers that propose at the same moment may
    propose the same candidate, for neither knows the other's trial yet; both then evaluate it. With ``n`` workers a
    study ends with at most ``n`` candidates more than asked for: those that were under way, and that of the first
    process where another one took the last measurement.

    Args:
        loads: How each worker loads the model.
        task: The task of the first process, with the study's name in it.
        storage: URL of the storage that the study is kept in.
        when_failed: Called with the number and the message of a worker that gave up, by :meth:`check` and at the end.
    """

    def __init__(
        self, loads: Sequence[Load], task: SearchTask, storage: str, when_failed: Callable[[int, str], None]
    ) -> None:
        self._loads = loads
        self._task = task
        self._storage = storage
        self._when_failed = when_failed
        self._running: list[tuple[BaseProcess, Connection]] = []
        self._reported: set[int] = set()  # numbers of workers that failed

    def __enter__(self) -> Workers:
        try:
            for number, load in enumerate(self._loads, start=1):
                self._start(number, load)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._wait()
        finally:  # on Ctrl-C while waiting, too
            self._end()

    def check(self) -> None:
        """Report the workers that failed since the last call, each once, while the others continue."""
        for number, (process, messages) in enumerate(self._running, start=1):
            status = process.exitcode  # read before the message: what ended has sent it
            message = _message(messages)
            if (message or status) and number not in self._reported:
                self._reported.add(number)
                self._when_failed(number, message or f"ended with exit code {status}")

    def _wait(self) -> None:
        for process, _ in self._running:
            process.join()
            self.check()

    def _start(self, number: int, load: Load) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        messages, theirs = context.Pipe(duplex=False)
        work = Work(
            load,
            replace(self._task, worker=number),
            self._storage,
            torch.get_num_threads(),
            optuna.logging.get_verbosity(),
        )
        process = context.Process(
            target=worker_process.run,
            args=(pickle.dumps((run_worker, work)), theirs),
            name=f"layerskip worker {number}",
            daemon=True,
        )
        with _ctrl_c_ignored():  # inherited, so that Ctrl-C does not break the worker's imports either
            process.start()
        theirs.close()
        self._running.append((process, messages))

    def _end(self) -> None:
        """Let each worker enqueue the trial that it is running again."""
        try:
            self.check()  # before the others end in another way than by themselves
        finally:
            for process, _ in self._running:
                process.terminate()
            for process, _ in self._running:
                process.join(_SECONDS_TO_END)
                process.kill()
                process.join()
            self._running.clear()


def _message(messages: Connection) -> str | None:
    try:
        return str(messages.recv()) if messages.poll() else None
    except EOFError:  # it ended without a message
        return None


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_worker(work: Work, messages: Connection) -> None:
    """Work on a study, in a process of its own, until it is done or this process is ended."""
    # Ctrl-C reaches all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    torch.set_num_threads(work.threads)  # a part of the device's name
    optuna.logging.set_verbosity(work.verbosity)
    try:
        engine, draft_layers = work.load()
        search = Search(engine, work.task, open_storage(work.storage), draft_layers=draft_layers)
        study = search.open()
        search.explore(study, search.prepare(study))
    except LayerSkipError as error:
        messages.send(str(error))
    except (RuntimeError, MemoryError, OSError) as error:
        shortage = out_of_memory(error)
        if shortage is None:
            raise
        messages.send(shortage)
    except KeyboardInterrupt:
        pass


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C: the trial in hand is enqueued again."""
    raise KeyboardInterrupt
