"""Durations on a device: medians of interleaved repeats, between two waits for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]


def seconds_of(run: Run, device: torch.device, *, repeats: int = 10) -> float:
    """Median seconds of a call, after one that is not counted."""
    return interleaved({"": run}, device, repeats=repeats)[""]


def interleaved(runs: Mapping[str, Run], device: torch.device, *, repeats: int = 10) -> dict[str, float]:
    """Median seconds of several calls that take turns, after a turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(1 + repeats):
        for name, run in runs.items():
            taken = timed(run, device)
            if repeat:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def timed(run: Run, device: torch.device) -> float:
    """Seconds of one call: on CUDA by events on the device, else by the host's clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def wall_seconds(run: Run, device: torch.device) -> float:
    """Seconds of one call by the host's clock, the device idle before and after."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def host_seconds(run: Run, device: torch.device, *, repeats: int = 10) -> float:
    """Median seconds until a call returns, the device idle before it; nothing waits for what it started."""
    seconds = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    _wait(device)
    return statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
