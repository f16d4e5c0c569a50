"""The CUDA-graph engine: passes are captured once and replayed, so that the host starts a whole step with one call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from layerskip.costs import PassCosts
from layerskip.engine.base import DraftStep, Scored, SharedPrefix
from layerskip.engine.captured_passes import CapturedCatchUp, CapturedDraft, CapturedTree, CapturedVerification
from layerskip.engine.compilation import compiled_in_fixed_shapes, uncompiled
from layerskip.engine.eager import EagerEngine
from layerskip.engine.fused_stacks import FusedStacks
from layerskip.engine.fused_sublayers import FusedAttention, FusedMLP, Fusing, fused_norm
from layerskip.engine.graph_cache import GraphCache
from layerskip.engine.graph_capture import Capture, CudaGraphCapture
from layerskip.engine.joint_linears import join_weights
from layerskip.errors import CaptureError, InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sublayers import Stack, StackKey, Step
from layerskip.token_tree import MOST_LEAVES, TokenTree

logger = logging.getLogger(__name__)

# Captured stacks kept, those used last; a search goes through hundreds, and each holds buffers of its own. Measuring
# costs goes through up to 21 in turn, seven for each precision.
STACKS_KEPT = 32
# A generation that ends within so many of the smallest buckets has one bucket. Reading all of their keys and values
# costs less than capturing passes anew in the middle of a text: on Llama-3-8B, under a percent of the bytes of a step.
_ONE_BUCKET = 4
# Share of the device's free memory that keys and values may take before a generation needs them.
_ROOM = 0.1

Key = TypeVar("Key")
Captured = TypeVar("Captured")


@dataclass
class _CapturedSteps:
    """The captured steps of one stack, by bucket."""

    stack: Stack  # keeps alive what its key names
    one: dict[int, CapturedDraft] = field(default_factory=dict)
    two: dict[int, CapturedCatchUp] = field(default_factory=dict)


class GraphEngine:
    """Runs draft steps and verifications as CUDA graphs, and prompts, whose lengths all differ, eagerly.

    A model that cannot be captured runs eagerly, after one line in the log. Passes run sublayers in fewer kernels than
    the model's own modules, where a check finds them equal to rounding.

    It owns one cache for all generations, because captured passes write to fixed addresses; it has room for the
    model's context where that takes a tenth of the device's free memory. Where a text needs a larger one, captured
    passes are dropped.

    A draft step in which a draft layer has to see more than two tokens runs eagerly.

    Verification does not resume from the hidden states that drafting computed. Each skip set would need captured
    verifications of its own, from its own depth. And graphs are used where the verification cost v is nearly flat, so
    that resuming could save at most ``share * (v(width) - 1)`` plain steps, next to nothing.

    Args:
        model: The model, on one CUDA device.
        capture: How to capture a pass; None captures CUDA graphs.
        smallest_bucket: Attention in a captured pass reads a bucket of this many positions, doubled until the text
            fits, so that a short text does not pay for the longest context.
        in_place: Whether weights that take the same input may be laid one after the other in memory, so that they
            are one product. They stay the same parameters with the same values.

    Attributes:
        in_place: See above.

    Raises:
        InvalidInputError: The model is not on one CUDA device, and ``capture`` is None.
    """

    name = "cuda-graphs"
    resumes = False
    needs = "CUDA graphs need the whole model on one CUDA device"

    def __init__(
        self,
        model: LayerSkipModel,
        capture: Capture | None = None,
        *,
        smallest_bucket: int = 256,
        in_place: bool = False,
    ) -> None:
        devices = {sublayer.device for sublayer in model.sublayers}
        if (capture is None and {device.type for device in devices} != {"cuda"}) or len(devices) > 1:
            raise InvalidInputError(f"engine '{self.name}': {self.needs}; use the eager engine")
        self.costs: PassCosts | None = None
        self.model = model
        self._smallest_bucket, self.in_place = smallest_bucket, in_place
        self._eager = EagerEngine(model)
        self._capture = capture or CudaGraphCapture(model.device)
        self._cache: GraphCache | None = None
        self._planned = 0  # positions of the generation that runs
        self._moves = 0  # of the cache that passes were captured with
        self._drafts: dict[StackKey, _CapturedSteps] = {}
        self._verifications: dict[tuple[int, int], CapturedVerification] = {}  # by width and bucket
        self._trees: dict[tuple[int, int], CapturedTree] = {}  # likewise
        self._captures_passes = True
        self._fuse()

    def _fuse(self) -> None:
        model = self.model
        fusing = Fusing(model)
        steps: dict[int, Step] = {}
        for index, sublayer in enumerate(map(uncompiled, model.sublayers)):
            expected = fusing.probe(sublayer)
            if self.in_place:
                join_weights(sublayer.module)
            steps[index] = fusing.fused(sublayer, expected, model.dtype)
        norm = fused_norm(model.final_norm)
        # Passes whose shapes all differ are not compiled.
        self._eager.passes = model.through(list(steps.values()), model.head, norm)
        self._stacks = self._uncompiled_stacks = FusedStacks(model, steps, fusing)
        backend = model.compile_backend
        self.passes = self._eager.passes
        if backend is not None:
            compiled: dict[int, Step] = dict(enumerate(model.sublayers))
            for index, step in steps.items():
                if isinstance(step, FusedAttention | FusedMLP):
                    compiled[index] = compiled_in_fixed_shapes(step, backend)
            self._stacks = FusedStacks(model, compiled, fusing)
            self.passes = model.through(list(compiled.values()), model.head, norm)
        self._captured_in = model.read_state()

    @property
    def captures(self) -> bool:
        return True

    def check_current(self) -> None:
        """As for any engine; of a model that was changed, passes are captured anew."""
        self.model.check_current()
        if self.model.read_state() != self._captured_in:
            self._drop_captured()
            self._cache = None
            self._fuse()

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
            self._cache = GraphCache(self.model.num_layers, max(needed, self._capacity_for(self._roomy())))
            self._moves = 0
        self._cache.rollback(0)
        self._cache.uses += 1
        self._planned = capacity
        return self._cache

    def can_continue(self, cache: KVCache) -> bool:
        return cache is self._cache

    def _capacity_for(self, positions: int) -> int:
        padding = 0 if self.costs is None else max(self.costs.sublayers) - 1
        return self.bucket_of(positions + MOST_LEAVES + padding)

    def _roomy(self) -> int:
        """Positions of the model's context whose keys and values take little of the device's free memory."""
        device = self.model.device
        if device.type != "cuda":
            return 0
        free, _ = torch.cuda.mem_get_info(device)
        fitting = _ROOM * free / self.model.bytes_per_position
        return min(self.model.context_length, int(fitting / 2))  # a capacity is a bucket, up to twice as much

    def bucket_of(self, length: int) -> int:
        """The smallest bucket that holds so many positions."""
        bucket = self._smallest_bucket
        while bucket < length:
            bucket *= 2
        return bucket

    def prefill(self, tokens: Tensor, cache: KVCache) -> Scored:
        return self._eager.prefill(tokens, cache)

    def draft_step(self, tokens: Tensor, cache: KVCache, stack: Stack) -> DraftStep:
        captured = self._captured_step(len(tokens), cache, stack) if len(tokens) <= 2 else None
        if captured is None:  # more tokens that a draft layer has not seen, of any number: once a text
            return replace(self._eager.draft_step(tokens, cache, self._uncompiled_stacks.of(stack)), prefix=None)
        step = captured(tokens, cache.length)
        cache.advance(1)
        return step

    def _captured_step(self, width: int, cache: KVCache, stack: Stack) -> CapturedDraft | CapturedCatchUp | None:
        """The draft step over one or two tokens, captured now where it was not yet; None where passes run eagerly."""
        own, bucket = self._room_for(width, cache)
        steps = self._steps_of(stack)
        if width == 1:
            return self._captured_in_bucket(steps.one, bucket, lambda: self._capture_draft(steps.stack, bucket, own))
        return self._captured_in_bucket(steps.two, bucket, lambda: self._capture_catch_up(steps.stack, bucket, own))

    def verify(
        self, tokens: Tensor, cache: KVCache, shared: SharedPrefix | None = None, tree: TokenTree | None = None
    ) -> Scored:
        needed = len(tokens)
        width = needed if self.costs is None else self.costs.cheapest_width(needed)
        own, bucket = self._room_for(width, cache)
        key = width, bucket
        if tree is None or tree.is_chain:
            chain = self._captured_in_bucket(
                self._verifications, key, lambda: self._capture_verification(width, bucket, own)
            )
            scored = None if chain is None else chain(tokens, cache.length)
        else:
            branched = self._captured_in_bucket(self._trees, key, lambda: self._capture_tree(width, bucket, own))
            scored = None if branched is None else branched(tokens, cache.length, tree)
        if scored is None:
            return self._eager.verify(tokens, cache, None, tree)
        cache.advance(needed)
        return Scored(scored.logits[:needed], scored.states[:needed])

    def _captured_in_bucket(
        self, kept: dict[Key, Captured], key: Key, capture: Callable[[], Captured]
    ) -> Captured | None:
        """A captured pass, captured now where it was not yet; None where passes run eagerly, because it cannot be."""
        if key not in kept and self._captures_passes:
            try:
                kept[key] = capture()
            except CaptureError as error:
                logger.warning("engine '%s': %s; passes run eagerly", self.name, error)
                self._captures_passes = False
        return kept.get(key)

    def _room_for(self, width: int, cache: KVCache) -> tuple[GraphCache, int]:
        """The cache, and the bucket that a pass of this width needs."""
        assert isinstance(cache, GraphCache)  # every cache of this engine is its own
        cache.reserve(width)
        if cache.moves != self._moves:  # a prompt may have let it grow
            self._drop_captured()
            self._moves = cache.moves
        planned = min(self._capacity_for(self._planned), _ONE_BUCKET * self._smallest_bucket)
        return cache, min(max(self.bucket_of(cache.length + width), planned), cache.capacity)

    def _steps_of(self, stack: Stack) -> _CapturedSteps:
        """A stack's captured steps; those of the stacks used longest ago are dropped."""
        known = self._drafts.pop(stack.key, None)
        steps = self._drafts[stack.key] = known or _CapturedSteps(stack)
        for old in list(self._drafts)[:-STACKS_KEPT]:
            del self._drafts[old]
        return steps

    def _capture_draft(self, stack: Stack, bucket: int, cache: GraphCache) -> CapturedDraft:
        token, position = self._buffers(1, cache)

        def run() -> DraftStep:
            with cache.at(position, bucket):
                step = self._draft_step(stack, token, position, bucket, cache)
            token.copy_(step.likeliest)
            position.add_(1)
            return step

        return CapturedDraft(token, position, self._capture(run))

    def _capture_catch_up(self, stack: Stack, bucket: int, cache: GraphCache) -> CapturedCatchUp:
        tokens, positions = self._buffers(2, cache)

        def run() -> DraftStep:
            with cache.at(positions, bucket, known=1):
                return self._draft_step(stack, tokens, positions, bucket, cache)

        return CapturedCatchUp(tokens, positions, self._capture(run))

    def _draft_step(self, stack: Stack, tokens: Tensor, positions: Tensor, bucket: int, cache: GraphCache) -> DraftStep:
        context = self.passes.context_at(positions, bucket, cache)
        x = self._stacks.of(stack).run(self.passes.embed(tokens), context)[:, -1:]
        return DraftStep.of(self.passes.logits(x, stack)[0], stack.token_ids, prefix=None)

    def _capture_verification(self, width: int, bucket: int, cache: GraphCache) -> CapturedVerification:
        passes = self.passes
        tokens, positions = self._buffers(width, cache)

        def run() -> Scored:
            with cache.at(positions, bucket):
                context = passes.context_at(positions, bucket, cache)
                x = passes.target_stack.run(passes.embed(tokens), context)
            return Scored(passes.logits(x), x[0])

        return CapturedVerification(tokens, positions, self._capture(run))

    def _capture_tree(self, width: int, bucket: int, cache: GraphCache) -> CapturedTree:
        passes = self.passes
        tokens, slots = self._buffers(width, cache)
        positions, ancestors = slots.clone(), torch.eye(width, dtype=torch.bool, device=passes.device)

        def run() -> Scored:
            with cache.at(slots, bucket):
                context = passes.tree_context_at(slots, positions, ancestors, bucket, cache)
                x = passes.target_stack.run(passes.embed(tokens), context)
            return Scored(passes.logits(x), x[0])

        return CapturedTree(tokens, slots, positions, ancestors, self._capture(run))

    def _buffers(self, width: int, cache: GraphCache) -> tuple[Tensor, Tensor]:
        """Tokens and positions of a pass, ``[width]`` each."""
        device = self.model.device
        tokens = torch.zeros(width, dtype=torch.long, device=device)
        # After the text, where a trial run before the capture does no harm.
        return tokens, torch.arange(cache.length, cache.length + width, device=device)
