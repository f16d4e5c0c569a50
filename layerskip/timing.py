"""Clocks that wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what it was given; returns at once on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_seconds(device: torch.device) -> float:
    """Seconds on a steady clock, read when the device has nothing left to do."""
    synchronize(device)
    return time.perf_counter()


class PhaseClock:
    """Seconds spent in each of several phases that follow one another on one device.

    On CUDA the phases are timed by events on the device, so that measuring adds no wait; on every other device by the
    host's clock.

    Args:
        device: Where the phases run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the enclosed block towards ``name``."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
        for phase, begin, end in self._pending:
            end.synchronize()
            self._add(phase, begin.elapsed_time(end) / 1000)
        self._pending.clear()
        return self._seconds.get(name, 0.0)


def duration(seconds: float) -> str:
    """Seconds for people, as ``3 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
