"""The CUDA-graph engine: passes are captured once and replayed, so that the host starts a whole step with one call."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from layerskip.costs import PassCosts
from layerskip.engine.base import DraftStep, Scored, SharedPrefix
from layerskip.engine.eager import EagerEngine
from layerskip.errors import CaptureError, InvalidInputError, first_line
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sublayers import Stack
from layerskip.token_tree import MOST_LEAVES, TokenTree, ancestors_on, numbers_on

logger = logging.getLogger(__name__)


class GraphCache(KVCache):
    """Keys and values at fixed addresses, read in buckets of the context.

    Outside captured passes it is an ordinary cache. In a captured pass, new keys and values go to the positions in a
    tensor, and attention reads the whole bucket: a mask excludes what comes after the text.

    Args:
        num_layers: Number of decoder layers.
        capacity: Positions to allocate.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(num_layers, capacity)
        self._positions: Tensor | None = None
        self._bucket = 0

    @contextmanager
    def at(self, positions: Tensor, bucket: int) -> Iterator[None]:
        """For the enclosed pass, write at positions ``[n]`` on the device and read the first ``bucket`` ones."""
        self._positions, self._bucket = positions, bucket
        try:
            yield
        finally:
            self._positions = None

    def reserve(self, positions: int) -> None:
        """Captured passes have the buffers' addresses, so that nothing can grow.

        Raises:
            InvalidInputError: There is no room.
        """
        if self.length + positions > self.capacity:
            raise InvalidInputError(f"engine: {self.length + positions} positions exceed the cache of {self.capacity}")

    def _write(self, buffers: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        if self._positions is None:
            return super()._write(buffers, layer, new, end)
        buffer = buffers[layer]
        if buffer is None:
            buffer = buffers[layer] = self._allocate(new)
        buffer.index_copy_(2, self._positions, new)
        return buffer[:, :, : self._bucket]

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, because masked values are still multiplied by 0, and 0 times uninitialized memory may be NaN.
        return like.new_zeros((*like.shape[:2], self.capacity, like.shape[3]))


@dataclass(frozen=True)
class CapturedVerification:
    """A pass of the target model of one width and bucket.

    Args:
        tokens: ``[width]``, where it reads the tokens.
        positions: ``[width]``, where it reads their positions.
        replay: Runs it; the next replay overwrites its output.
    """

    tokens: Tensor
    positions: Tensor
    replay: Callable[[], Scored]

    def __call__(self, tokens: Tensor, past: int) -> Scored:
        """The pass of up to ``width`` tokens after ``past`` others, padded with whatever was there before."""
        self.tokens[: len(tokens)].copy_(tokens)
        torch.arange(past, past + len(self.positions), out=self.positions)
        return self.replay()


@dataclass(frozen=True)
class CapturedTree:
    """A pass of the target model over trees of one width, of any shape, in one bucket.

    Args:
        tokens: ``[width]``, where it reads the tokens.
        slots: ``[width]``, where it reads their places in the cache.
        positions: ``[width]``, where it reads their positions in the text.
        ancestors: ``[width, width]``, where it reads the ancestors of each row.
        replay: Runs it; the next replay overwrites its output.
    """

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    ancestors: Tensor
    replay: Callable[[], Scored]

    def __call__(self, tokens: Tensor, past: int, tree: TokenTree) -> Scored:
        """The pass of a tree after ``past`` tokens, padded with whatever was there before."""
        width, device = len(self.tokens), self.tokens.device
        tree = tree.padded(width)
        self.tokens[: len(tokens)].copy_(tokens)
        torch.arange(past, past + width, out=self.slots)
        torch.add(numbers_on(tree.depths, device), past, out=self.positions)
        self.ancestors.copy_(ancestors_on(tree, device))
        return self.replay()


class CapturedDraft:
    """A draft step of one stack and bucket, which writes its choice and its next position where it will read them.

    Args:
        token: ``[1]``, where it reads the token and writes its likeliest next one.
        position: ``[1]``, where it reads the position and writes the next.
        replay: Runs it; the next replay overwrites its output.
    """

    def __init__(self, token: Tensor, position: Tensor, replay: Callable[[], DraftStep]) -> None:
        self._token, self._position, self._replay = token, position, replay
        # The buffers' content, so that a step that continues the last one has nothing to set.
        self._next_token: Tensor | None = None
        self._next_past: int | None = None

    def __call__(self, token: Tensor, past: int) -> DraftStep:
        """The step of a token after ``past`` others."""
        # A slice of the last step's token is another tensor over the same memory.
        if self._next_token is None or token.data_ptr() != self._next_token.data_ptr():
            self._token.copy_(token)
        if past != self._next_past:
            self._position.fill_(past)
        self._next_token = self._next_past = None  # unknown, should the replay be interrupted
        step = self._replay()
        # Used until the draft's end, while the next replay writes to the same buffer.
        step = replace(step, likeliest=step.likeliest.clone())
        self._next_token, self._next_past = step.likeliest, past + 1
        return step


# Captured stacks kept, those used last; a search goes through hundreds, and each holds buffers of its own. Measuring
# costs goes through seven in turn.
_STACKS_KEPT = 8

Outputs = TypeVar("Outputs")
CapturedPass = TypeVar("CapturedPass", CapturedVerification, CapturedTree)


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
                with _no_garbage_collection():  # which could destroy another graph, and so end the capture
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
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
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


class GraphEngine:
    """Runs draft steps and verifications as CUDA graphs, and prompts, whose lengths all differ, eagerly.

    A model that cannot be captured runs eagerly, after one line in the log.

    It owns one cache for all generations, because captured passes write to fixed addresses; a generation that needs a
    larger one replaces it and drops the captured passes.

    A draft step in which a draft layer has to see more than one token runs eagerly.

    Verification does not resume from the hidden states that drafting computed. Each skip set would need captured
    verifications of its own, from its own depth. And graphs are used where the verification cost v is nearly flat, so
    that resuming could save at most ``share * (v(width) - 1)`` plain steps, next to nothing.

    Args:
        model: The model, on one CUDA device.
        capture: How to capture a pass; None captures CUDA graphs.
        smallest_bucket: Attention in a captured pass reads a bucket of this many positions, doubled until the text
            fits, so that a short text does not pay for the longest context.

    Raises:
        InvalidInputError: The model is not on one CUDA device, and ``capture`` is None.
    """

    name = "cuda-graphs"
    resumes = False
    needs = "CUDA graphs need the whole model on one CUDA device"

    def __init__(self, model: LayerSkipModel, capture: Capture | None = None, *, smallest_bucket: int = 256) -> None:
        devices = {sublayer.device for sublayer in model.sublayers}
        if (capture is None and {device.type for device in devices} != {"cuda"}) or len(devices) > 1:
            raise InvalidInputError(f"engine '{self.name}': {self.needs}; use the eager engine")
        self.costs: PassCosts | None = None
        self.model = self.passes = model
        self._smallest_bucket = smallest_bucket
        self._eager = EagerEngine(model)
        self._capture = capture or CudaGraphCapture(model.device)
        self._cache: GraphCache | None = None
        self._drafts: dict[Stack, dict[int, CapturedDraft]] = {}  # by bucket
        self._verifications: dict[tuple[int, int], CapturedVerification] = {}  # by width and bucket
        self._trees: dict[tuple[int, int], CapturedTree] = {}  # likewise
        self._captured_in = model.read_state()
        self._captures_passes = True

    @property
    def captures(self) -> bool:
        return True

    def check_current(self) -> None:
        """As for any engine; of a model that was changed, passes are captured anew."""
        self.model.check_current()
        state = self.model.read_state()
        if state != self._captured_in:
            self._drop_captured()
            self._cache, self._captured_in = None, state

    def _drop_captured(self) -> None:
        self._drafts.clear()
        self._verifications.clear()
        self._trees.clear()
        self._capture.renew()
        self._captures_passes = True

    def new_cache(self, capacity: int) -> KVCache:
        """The engine's own cache, emptied; an earlier generation's is no longer valid."""
        needed = self._capacity_for(capacity)
        if self._cache is None or self._cache.capacity < needed:
            self._drop_captured()
            self._cache = GraphCache(self.model.num_layers, needed)
        self._cache.rollback(0)
        self._cache.uses += 1
        return self._cache

    def has_room(self, cache: KVCache, capacity: int) -> bool:
        return cache is self._cache and self._capacity_for(capacity) <= cache.capacity

    def _capacity_for(self, positions: int) -> int:
        padding = 0 if self.costs is None else max(self.costs.sublayers) - 1
        return self.bucket_of(positions + MOST_LEAVES + padding)

    def bucket_of(self, length: int) -> int:
        """The smallest bucket that holds so many positions."""
        bucket = self._smallest_bucket
        while bucket < length:
            bucket *= 2
        return bucket

    def prefill(self, tokens: Tensor, cache: KVCache) -> Scored:
        return self._eager.prefill(tokens, cache)

    def draft_step(self, tokens: Tensor, cache: KVCache, stack: Stack) -> DraftStep:
        if len(tokens) > 1:  # tokens that a draft layer has not seen, of any length: once a round at most
            return replace(self._eager.draft_step(tokens, cache, stack), prefix=None)
        own, bucket = self._room_for(1, cache)
        steps = self._steps_of(stack)
        if bucket not in steps and self._captures_passes:
            with self._falling_back():
                steps[bucket] = self._capture_draft(stack, bucket, own)
        if bucket not in steps:
            return replace(self._eager.draft_step(tokens, cache, stack), prefix=None)
        step = steps[bucket](tokens, cache.length)
        cache.advance(1)
        return step

    def verify(
        self, tokens: Tensor, cache: KVCache, shared: SharedPrefix | None = None, tree: TokenTree | None = None
    ) -> Scored:
        needed = len(tokens)
        width = needed if self.costs is None else self.costs.cheapest_width(needed)
        own, bucket = self._room_for(width, cache)
        if tree is None or tree.is_chain:
            chain = self._captured_at(self._verifications, self._capture_verification, width, bucket, own)
            scored = None if chain is None else chain(tokens, cache.length)
        else:
            branched = self._captured_at(self._trees, self._capture_tree, width, bucket, own)
            scored = None if branched is None else branched(tokens, cache.length, tree)
        if scored is None:
            return self._eager.verify(tokens, cache, None, tree)
        cache.advance(needed)
        return Scored(scored.logits[:needed], scored.states[:needed])

    def _captured_at(
        self,
        kept: dict[tuple[int, int], CapturedPass],
        capture: Callable[[int, int, GraphCache], CapturedPass],
        width: int,
        bucket: int,
        cache: GraphCache,
    ) -> CapturedPass | None:
        """The pass of a width and bucket, captured now where it was not yet; None where passes run eagerly."""
        if (width, bucket) not in kept and self._captures_passes:
            with self._falling_back():
                kept[width, bucket] = capture(width, bucket, cache)
        return kept.get((width, bucket))

    @contextmanager
    def _falling_back(self) -> Iterator[None]:
        """Run eagerly from now on if a pass in the block cannot be captured."""
        try:
            yield
        except CaptureError as error:
            logger.warning("engine '%s': %s; passes run eagerly", self.name, error)
            self._captures_passes = False

    def _room_for(self, width: int, cache: KVCache) -> tuple[GraphCache, int]:
        """The cache, and the bucket that a pass of this width needs."""
        assert isinstance(cache, GraphCache)  # every cache of this engine is its own
        cache.reserve(width)
        return cache, self.bucket_of(cache.length + width)

    def _steps_of(self, stack: Stack) -> dict[int, CapturedDraft]:
        """A stack's captured steps by bucket; those of the stacks used longest ago are dropped."""
        steps = self._drafts[stack] = self._drafts.pop(stack, {})
        for old in list(self._drafts)[:-_STACKS_KEPT]:
            del self._drafts[old]
        return steps

    def _capture_draft(self, stack: Stack, bucket: int, cache: GraphCache) -> CapturedDraft:
        model = self.model
        token, position = self._buffers(1, cache)

        def run() -> DraftStep:
            with cache.at(position, bucket):
                context = model.context_at(position, bucket, cache)
                x = stack.run(model.embed(token), context)
            step = DraftStep.of(model.logits(x, stack)[0], stack.token_ids, prefix=None)
            token.copy_(step.likeliest)
            position.add_(1)
            return step

        return CapturedDraft(token, position, self._capture(run))

    def _capture_verification(self, width: int, bucket: int, cache: GraphCache) -> CapturedVerification:
        model = self.model
        tokens, positions = self._buffers(width, cache)

        def run() -> Scored:
            with cache.at(positions, bucket):
                context = model.context_at(positions, bucket, cache)
                x = model.target_stack.run(model.embed(tokens), context)
            return Scored(model.logits(x), x[0])

        return CapturedVerification(tokens, positions, self._capture(run))

    def _capture_tree(self, width: int, bucket: int, cache: GraphCache) -> CapturedTree:
        model = self.model
        tokens, slots = self._buffers(width, cache)
        positions, ancestors = slots.clone(), torch.eye(width, dtype=torch.bool, device=model.device)

        def run() -> Scored:
            with cache.at(slots, bucket):
                context = model.tree_context_at(slots, positions, ancestors, bucket, cache)
                x = model.target_stack.run(model.embed(tokens), context)
            return Scored(model.logits(x), x[0])

        return CapturedTree(tokens, slots, positions, ancestors, self._capture(run))

    def _buffers(self, width: int, cache: GraphCache) -> tuple[Tensor, Tensor]:
        """Tokens and positions of a pass, ``[width]`` each."""
        device = self.model.device
        tokens = torch.zeros(width, dtype=torch.long, device=device)
        # After the text, where a trial run before the capture does no harm.
        return tokens, torch.arange(cache.length, cache.length + width, device=device)
