"""Captures passes as CUDA graphs, which run anew with one call."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from layerskip.errors import CaptureError, first_line

Outputs = TypeVar("Outputs")

# Captures of several engines, in threads of one process.
_ONE_AT_A_TIME = threading.Lock()


class Capture(Protocol):
    """Captures passes."""

    def __call__(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Capture a pass; what it returns runs it once more, on what its input buffers hold then.

        Raises:
            CaptureError: The pass cannot be captured; a later one may be.
        """

    def renew(self) -> None:
        """Begin anew, after all passes that were captured so far were dropped."""


class CudaGraphCapture:
    """Captures passes as CUDA graphs that share one memory pool, so that buffers between sublayers exist once.

    One stream of its own captures all of them, and another warms up: graphs of different engines, or devices, must not
    share a stream, whose workspaces go with the first graph that is destroyed.

    Args:
        device: Where the passes run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream, self._warm_up = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.renew()

    def renew(self) -> None:
        # The allocator refuses a handle whose graphs are all gone while some of its memory is still in use.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                # Garbage collection could destroy another graph, and so end the capture.
                with _ONE_AT_A_TIME, _no_garbage_collection():
                    return self._captured(run)
            except (RuntimeError, NotImplementedError) as error:
                torch.cuda.set_stream(before)  # torch.cuda.graph leaves its own behind
                self.renew()
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise CaptureError(f"this model cannot be captured: {first_line(error)}") from error

    def _captured(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        self._warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._warm_up):
            run()  # libraries allocate their workspaces at the first call, which must not be captured
        torch.cuda.current_stream().wait_stream(self._warm_up)
        graph = torch.cuda.CUDAGraph()
        # Of other threads nothing is forbidden meanwhile; they may decode eagerly.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
