"""The packed engine: passes on a CPU, whose linears run on weights that are packed once for oneDNN."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from layerskip.engine.base import DraftStep
from layerskip.engine.eager import EagerEngine
from layerskip.engine.fused_stacks import FusedStacks
from layerskip.engine.fused_sublayers import Fusing, fused_norm
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.model_state import check_honoured
from layerskip.packed_linear import can_be_packed, has_kernels_for, pack_children, packed_alone, packing_available
from layerskip.sublayers import Stack, Step
from layerskip.utils import dtype_name


class PackedEngine(EagerEngine):
    """Runs passes over packed linears, with fewer operators between them.

    The model stays as it was: its linears are copied, which takes as much memory again. With ``in_place`` the packed
    weights take the place of the plain ones in the model, which works on as it did, only slower where it needs a plain
    weight; of a head that shares its weight with the embedding there is a packed copy all the same.

    Args:
        model: The model, on the CPU, in float32 or bfloat16.
        in_place: Whether the model may be changed.
        plain_one_row: Whether a pass over a single token runs on the plain weights; some CPUs are faster with them. Not
            together with ``in_place``.

    Attributes:
        plain_one_row: See above.

    Raises:
        InvalidInputError: The model cannot be packed here.
    """

    name = "packed"
    needs = "packed weights need the whole model on the CPU"

    def __init__(self, model: LayerSkipModel, *, in_place: bool = False, plain_one_row: bool = False) -> None:
        super().__init__(model)
        if in_place and plain_one_row:
            raise InvalidInputError("plain_one_row: needs the plain weights, which in_place replaces")
        if reason := why_not_packed(model):
            raise InvalidInputError(f"engine '{self.name}': {reason}; use the {EagerEngine.name} engine")
        pack = partial(pack_children, plain_one_row=plain_one_row)
        self.plain_one_row = plain_one_row
        fusing = Fusing(model)
        steps = dict(_packed_steps(model, pack, fusing, in_place=in_place))
        head = _packed_head(model, in_place=in_place, plain_one_row=plain_one_row)
        self._stacks = FusedStacks(model, steps, fusing)
        self.passes = model.through([steps[index] for index in sorted(steps)], head, fused_norm(model.final_norm))
        if in_place:
            model.note_packed()
        self._made_in = model.read_state()

    def check_current(self) -> None:
        check_honoured(self.model.hf_model)
        # Layers with an adapter are not packed.
        self.model.check_unchanged(self._made_in, f"engine '{self.name}'", but="adapters")

    def draft_step(self, tokens: Tensor, cache: KVCache, stack: Stack) -> DraftStep:
        return super().draft_step(tokens, cache, self._stacks.of(stack))


def why_not_packed(model: LayerSkipModel) -> str | None:
    """Why the packed engine cannot run a model; None if it can."""
    if not packing_available():
        return "needs a build of PyTorch with oneDNN"
    if any(sublayer.device.type != "cpu" for sublayer in model.sublayers):
        return PackedEngine.needs
    if not has_kernels_for(model.dtype):
        return f"has no kernels for {dtype_name(model.dtype)}"
    if model.compiled:
        return "does not run compiled sublayers"
    return None


def _packed_steps(
    model: LayerSkipModel, pack: Callable[[nn.Module], None], fusing: Fusing, *, in_place: bool
) -> Iterator[tuple[int, Step]]:
    """For each sublayer's index, what runs in its place."""
    for index, sublayer in enumerate(model.sublayers):
        expected = fusing.probe(sublayer)
        if in_place:
            pack(sublayer.module)
            sublayer.module = sublayer.module  # lets go of the plain weights
        packed = copy.copy(sublayer)
        if not in_place:
            packed.module = _shallow_copy(sublayer.module)
            pack(packed.module)
        yield index, fusing.fused(packed, expected, model.dtype)


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A module over the same parts, whose parts can be replaced without a change to the original."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _packed_head(model: LayerSkipModel, *, in_place: bool, plain_one_row: bool) -> nn.Module:
    head: Any = model.head
    if not can_be_packed(head):
        return head  # type: ignore[no-any-return]
    packed = packed_alone(head, plain_one_row=plain_one_row)
    if in_place and head.weight is not model.hf_model.get_input_embeddings().weight:
        model.hf_model.set_output_embeddings(packed)
        model.head = packed
    return packed
