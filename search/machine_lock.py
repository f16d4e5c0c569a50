"""Per-machine lock: predictions share the machine, a measurement has it to itself."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from layerskip.errors import LayerSkipError


class MachineLock:
    """Keeps all processes of a machine that search or measure from disturbing a measurement.

    Two locked files: a process that measures holds the door shut while it waits for those inside to finish, so that new
    predictions cannot keep it waiting for ever. The system lifts a lock when its process ends, however it ends.

    Args:
        folder: Where the files lie; all processes name the same one.
        device: The device that is measured; different devices do not disturb each other.
        workers: Processes among which the processor's threads are divided while none measures.

    Raises:
        LayerSkipError: The folder cannot be written.
    """

    def __init__(self, folder: Path, device: torch.device, *, workers: int = 1) -> None:
        name = f"measuring-{device.type}-{device.index or 0}"
        self._door, self._room = folder / f"{name}.door", folder / f"{name}.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._door.touch()
            self._room.touch()
        except OSError as error:
            raise LayerSkipError(
                f"{folder}: cannot keep the search's locks: {error.strerror}; set LAYERSKIP_CACHE to a writable folder"
            ) from error
        self._workers = workers
        self._exclusive = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Wait until no process measures, and keep measurements waiting inside the block."""
        with ExitStack() as inside:
            with _locked(self._door, fcntl.LOCK_SH):
                inside.enter_context(_locked(self._room, fcntl.LOCK_SH))
            inside.enter_context(_threads(max(torch.get_num_threads() // self._workers, 1)))
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until no process predicts or measures, and keep all waiting inside the block; blocks may be nested."""
        if self._exclusive:
            yield
            return
        with _locked(self._door, fcntl.LOCK_EX), _locked(self._room, fcntl.LOCK_EX):
            self._exclusive = True
            try:
                yield
            finally:
                self._exclusive = False


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
