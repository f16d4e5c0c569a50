"""Several processes on one study: each takes the next trial, the first also plans what to measure, and reports."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, TracebackType

import optuna
import torch

from layerskip.engine import Engine
from layerskip.errors import LayerSkipError, out_of_memory
from layerskip.fingerprint import ModelIdentity
from layerskip.profile import DraftProfile
from search.draft_layers import trained_draft_layers
from search.prompts import PromptSplit
from search.settings import SearchSettings
from search.space import SearchSpace

# A worker that was told to end may be in the middle of a long pass; one that takes longer is killed.
_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Work:
    """What a worker needs to join a search; it can be sent to another process.

    Args:
        load: Loads the model, and makes its engine.
        identity: The model's identity.
        prompts: What to decode.
        storage: URL of the storage that the study lives in.
        settings: As in the first worker.
        space: As in the first worker.
        study: The study's name.
        folder: Where reference runs are kept.
        ends: Time on the machine's monotonic clock at which no new trial starts.
        load_profiles: Loads the profiles whose draft layers the space names, by where they come from.
    """

    load: Callable[[], Engine]
    identity: ModelIdentity
    prompts: PromptSplit
    storage: str
    settings: SearchSettings
    space: SearchSpace
    study: str
    folder: Path | None = None
    ends: float | None = None
    load_profiles: Callable[[], Mapping[str, DraftProfile]] = dict


class Workers(AbstractContextManager["Workers"]):
    """Processes that join a search when entered and are waited for at the end.

    A worker that is killed loses nothing but its trial in hand, which is tried once more; the others go on. An error,
    or Ctrl-C, in the first process ends them all, and what they had in hand is tried again when the study goes on.

    No trial is taken twice: what is enqueued goes to one worker alone. Two workers that draw at the same moment may
    propose the same candidate, for neither knows the other's trial yet; both then look at it. With ``n`` workers a
    study ends with at most ``n - 1`` candidates more than asked for, those that were under way.

    Args:
        work: One for each process.
        when_failed: Called with the number and the message of a worker that gave up.
    """

    def __init__(self, work: list[Work], when_failed: Callable[[int, str], None]) -> None:
        self._work = work
        self._when_failed = when_failed
        self._running: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> Workers:
        try:
            for number, work in enumerate(self._work, start=1):
                self._start(number, work)
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

    def _wait(self) -> None:
        for number, (process, messages) in enumerate(self._running, start=1):
            process.join()
            message = _message(messages)
            if message or process.exitcode:
                self._when_failed(number, message or f"ended with exit code {process.exitcode}")

    def _start(self, number: int, work: Work) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        ours, theirs = context.Pipe(duplex=False)
        settings = (torch.get_num_threads(), optuna.logging.get_verbosity())
        name = f"layerskip worker {number}"
        process = context.Process(target=_run, args=(work, number, theirs, *settings), name=name, daemon=True)
        with _ctrl_c_ignored():  # inherited: Ctrl-C reaches all of a terminal's processes, and this one will tell
            process.start()
        theirs.close()
        self._running.append((process, ours))

    def _end(self) -> None:
        """Let each put back what it has in hand."""
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
    except EOFError:  # it ended without a word
        return None


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set, nor Ctrl-C arrives
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(work: Work, number: int, messages: Connection, threads: int, verbosity: int) -> None:
    from search.search import Search
    from studies.storage import open_storage

    signal.signal(signal.SIGTERM, _interrupt)
    torch.set_num_threads(threads)  # a part of what the device is called
    optuna.logging.set_verbosity(verbosity)
    try:
        engine = work.load()
        search = Search(
            engine,
            work.identity,
            work.prompts,
            open_storage(work.storage),
            work.settings,
            space=work.space,
            draft_layers=trained_draft_layers(work.load_profiles(), engine.model),
            study_name=work.study,
            folder=work.folder,
            ends=work.ends,
            number=number,
        )
        search.explore(search.open())
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
    """Ended by the first worker: as on Ctrl-C, the trial in hand is enqueued again."""
    raise KeyboardInterrupt
