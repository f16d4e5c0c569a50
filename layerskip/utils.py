"""Atomic files, kept measurements, checksums, clocks, and the names of this machine's devices and libraries."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from layerskip.errors import LayerSkipError

T = TypeVar("T")

logger = logging.getLogger(__name__)


def digest(value: object) -> str:
    """The first 16 hexadecimal digits of a value's SHA-256, as JSON; what JSON cannot express is hashed as a text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Write a text as UTF-8; see :func:`write_bytes_atomically`."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part, even if this process is killed.

    Raises:
        OSError: The folder is missing, read-only or full. The old file is untouched.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device or a pipe would be replaced by a file
        raise OSError(errno.EINVAL, "not a regular file")
    # Not the process's id: containers that share a folder have the same ones.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def measured_once(
    file: Path,
    kind: type[T],
    measure: Callable[[], T],
    what: str,
    *,
    keep: Callable[[T], bool] = lambda measured: True,
) -> T:
    """What was measured earlier and kept in a file, or what is measured and kept now.

    Args:
        file: In the cache folder; named after everything that the measurement depends on.
        kind: Its type, a dataclass of numbers. A file that holds nothing of it is measured anew.
        measure: Measures.
        what: What is measured, for the warning where it cannot be kept.
        keep: Whether it is to be kept, or measured again by the next process.
    """
    from pydantic import TypeAdapter  # which passes themselves do without

    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_json(file.read_bytes())
    except (OSError, ValueError):  # not there, or not ours
        measured = measure()
    if not keep(measured):
        return measured
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, adapter.dump_json(measured, indent=2).decode() + "\n")
    except OSError as error:
        logger.warning("%s: cannot keep what %s: %s; the next start measures again", file, what, error.strerror)
    return measured


@contextmanager
def cache_write_errors(path: Path, what: str) -> Iterator[None]:
    """Turn an ``OSError`` in the block into one line: what cannot be kept in the cache, and what to do.

    Args:
        path: Where the block writes.
        what: What it writes, human-readable.

    Raises:
        LayerSkipError: The block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise LayerSkipError(
            f"{path}: cannot keep {what}: {error.strerror}; make room, or set LAYERSKIP_CACHE to another folder"
        ) from error


def numbers_to(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Numbers as a tensor on a device, ``[n]``, without waiting for what the device is busy with."""
    on_host = torch.tensor(numbers, dtype=torch.long, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue; returns at once on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_seconds(device: torch.device) -> float:
    """Seconds on a monotonic clock, read after synchronizing with the device."""
    synchronize(device)
    return time.perf_counter()


# Phases whose events are kept: so many later, the device has long finished them.
_EVENTS_KEPT = 64


class PhaseClock:
    """Stopwatch for named phases that follow one another on one device.

    On CUDA the phases are timed by events on the device, so that measuring adds no wait; on every other device by the
    host's clock.

    Args:
        device: Where the phases run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the enclosed block towards ``name``."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if len(self._pending) >= _EVENTS_KEPT:
                self._count_oldest()
            begin, end = self._spare.pop() if self._spare else _two_events()
            begin.record(stream)
            yield
            end.record(stream)
            self._pending.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - started)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self, name: str) -> float:
        """Seconds counted towards ``name``; waits for the device."""
        while self._pending:
            self._count_oldest()
        return self._seconds.get(name, 0.0)

    def _count_oldest(self) -> None:
        phase, begin, end = self._pending.popleft()
        end.synchronize()
        self._add(phase, begin.elapsed_time(end) / 1000)
        self._spare.append((begin, end))  # making events takes longer than using them again


def _two_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def duration(seconds: float) -> str:
    """Human-readable seconds, as ``3 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a floating-point type, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


_PACKAGES = ("layerskip", "torch", "transformers")


def device_name(device: torch.device) -> str:
    """A device's human-readable name: the GPU's, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"
    return str(device)


def _processor() -> str:
    """The processor's name, as far as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decoding runs on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path, not installed
            versions[package] = "unknown"
    return versions


@dataclass(frozen=True)
class Device:
    """A device of this machine.

    Args:
        name: What ``--device`` calls it.
        description: Its name and its size.
        supported: Whether layerskip decodes on it.
    """

    name: str
    description: str
    supported: bool


def devices() -> list[Device]:
    """This machine's devices, the one that ``auto`` takes first."""
    found = [_cuda_device(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    found.append(Device("cpu", device_name(torch.device("cpu")), True))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU; not supported, 'auto' takes the CPU", False))
    return found


def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    description = f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"
    return Device(f"cuda:{index}", description, True)
