"""Passes captured once as CUDA graphs and replayed: the host starts a whole step with one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from layerskip.engine.costs import PassCosts
from layerskip.engine.graph_cache import GraphCache
from layerskip.engine.interface import DraftStep, SharedPrefix
from layerskip.errors import InvalidInputError
from layerskip.stack.kv_cache import KVCache
from layerskip.stack.stack import Stack

if TYPE_CHECKING:
    from layerskip.stack.model import LayerSkipModel

# Captured stacks kept, the newest; a search goes through hundreds, and each holds buffers of its own.
_STACKS_KEPT = 4

Outputs = tuple[Tensor, Tensor | None]


class Replay(Protocol):
    """Runs what was captured once more, on what its input buffers hold now."""

    def __call__(self) -> Outputs: ...


Capture = Callable[[Callable[[], Outputs]], Replay]


class CudaGraphCapture:
    """Captures passes as CUDA graphs that share one memory pool, so that buffers between sublayers exist once.

    Args:
        device: Where the passes run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Outputs]) -> Replay:
        with torch.cuda.device(self._device):
            return self._captured(run)

    def _captured(self, run: Callable[[], Outputs]) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # libraries allocate their workspaces at the first call, which must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


def call_directly(run: Callable[[], Outputs]) -> Replay:
    """Capture nothing: run the pass anew each time. What the tests without a CUDA device use."""
    return run


@dataclass
class _CapturedPass:
    """A pass of one stack, width and bucket, with the buffers it reads."""

    tokens: Tensor  # [width]
    positions: Tensor  # [width]
    replay: Replay

    def __call__(self, tokens: Tensor, past: int) -> Outputs:
        self.tokens.copy_(tokens)
        torch.arange(past, past + len(self.positions), out=self.positions)
        return self.replay()


class GraphEngine:
    """Runs draft steps and verifications as captured graphs, and prompts, whose lengths all differ, eagerly.

    It owns one cache for all generations, because captured passes write to fixed addresses; a generation that needs a
    larger one replaces it and drops what was captured.

    Args:
        model: The model, on one CUDA device.
        capture: How to capture a pass; None captures CUDA graphs.
        smallest_bucket: Attention in a captured pass reads a bucket of this many positions, doubled until the text
            fits, so that a short text does not pay for the longest context.

    Raises:
        InvalidInputError: The model is not on one CUDA device and no other way to capture is given.
    """

    name = "cuda-graphs"
    captures = True

    def __init__(self, model: LayerSkipModel, capture: Capture | None = None, *, smallest_bucket: int = 256) -> None:
        devices = {sublayer.device for sublayer in model.sublayers}
        if (capture is None and {device.type for device in devices} != {"cuda"}) or len(devices) > 1:
            raise InvalidInputError("engine: CUDA graphs need the whole model on one CUDA device; use the eager engine")
        self.costs: PassCosts | None = None
        self._model = model
        self._smallest_bucket = smallest_bucket
        self._capture = capture or CudaGraphCapture(model.device)
        self._cache: GraphCache | None = None
        self._passes: dict[Stack, dict[tuple[int, int], _CapturedPass]] = {}

    def new_cache(self, capacity: int) -> KVCache:
        """The engine's own cache, emptied; an earlier generation's is no longer valid."""
        padding = 0 if self.costs is None else max(self.costs.sublayers) - 1
        needed = self.bucket_of(capacity + padding)
        if self._cache is None or self._cache.capacity < needed:
            self._passes.clear()
            self._cache = GraphCache(self._model.num_layers, needed)
        self._cache.rollback(0)
        return self._cache

    def bucket_of(self, length: int) -> int:
        """The smallest bucket that holds so many positions."""
        bucket = self._smallest_bucket
        while bucket < length:
            bucket *= 2
        return bucket

    def prefill(self, tokens: Tensor, cache: KVCache) -> Tensor:
        return self._model.logits(self._model.forward(tokens, cache)[:, -1:])[0]

    def draft_step(self, token: Tensor, cache: KVCache, stack: Stack) -> DraftStep:
        logits, prefix = self._run(token, cache, stack)
        cache.advance(1)
        # Kept across steps by the drafter, while the next replay writes to the same buffer.
        return DraftStep(logits[0], None if prefix is None else prefix.clone())

    def verify(self, tokens: Tensor, cache: KVCache, shared: SharedPrefix | None) -> Tensor:
        needed = len(tokens)
        width = needed if self.costs is None else self.costs.cheapest_width(needed)
        padded = torch.nn.functional.pad(tokens, (0, width - needed))
        logits, _ = self._run(padded, cache, self._model.full_stack)
        cache.advance(needed)
        return logits[:needed]

    def _run(self, tokens: Tensor, cache: KVCache, stack: Stack) -> Outputs:
        assert isinstance(cache, GraphCache)  # every cache of this engine is its own
        width = len(tokens)
        if cache.length + width > cache.capacity:
            raise InvalidInputError(f"engine: {cache.length + width} positions exceed the cache of {cache.capacity}")
        captured = self._captured(stack, width, self.bucket_of(cache.length + width), cache)
        return captured(tokens, cache.length)

    def _captured(self, stack: Stack, width: int, bucket: int, cache: GraphCache) -> _CapturedPass:
        passes = self._passes.setdefault(stack, {})
        if (width, bucket) not in passes:
            self._forget_old_stacks()
            passes[width, bucket] = self._capture_pass(stack, width, bucket, cache)
        return passes[width, bucket]

    def _forget_old_stacks(self) -> None:
        drafts = [stack for stack in self._passes if stack is not self._model.full_stack]
        for stack in drafts[:-_STACKS_KEPT]:
            del self._passes[stack]

    def _capture_pass(self, stack: Stack, width: int, bucket: int, cache: GraphCache) -> _CapturedPass:
        model = self._model
        tokens = torch.zeros(width, dtype=torch.long, device=model.device)
        # Behind the text, where trial runs before the capture do no harm.
        positions = torch.arange(cache.length, cache.length + width, device=model.device)
        drafting = stack is not model.full_stack

        def run() -> Outputs:
            cache.positions, cache.bucket = positions, bucket
            try:
                context = model.context_at(positions, bucket, cache)
                x = stack.run(model.embed(tokens), context, stop=stack.shared)
                prefix = x if drafting and stack.shared else None
                x = stack.run(x, context, start=stack.shared)
                return model.logits(x, stack), prefix
            finally:
                cache.positions = None

        return _CapturedPass(tokens, positions, self._capture(run))
