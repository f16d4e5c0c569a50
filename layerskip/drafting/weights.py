"""The weights of a draft beside the model's own: bridges, draft layers, draft heads and draft vocabulary."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from layerskip.drafting.bridges import Bridge
from layerskip.drafting.config import DraftLayerRef
from layerskip.drafting.draft_layer import DraftLayer, load_weights
from layerskip.drafting.heads import DraftHeads, HeadKind, empty_heads
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.sublayers import Step

# The names of tensors in a profile's file; the numbers are those of the module's constructor.
_NAME = re.compile(r"(?P<module>bridge\.\d+\.\d+|layer\.\d+\.\d+\.\d+|medusa|hydra)\.(?P<tensor>.+)")
_VOCABULARY = "token_ids"
_REPLACING = ("bridge.", "layer.")
# Hexadecimal digits of a checksum that tell one draft layer from another.
_DIGITS = 16


class DraftWeights(nn.Module):
    """What a draft needs besides the model's own weights.

    Args:
        bridges: Each for a run of skipped sublayers of its own.
        layers: Trained decoder layers, likewise. Where heads draft: none, or one after all sublayers that replaces none
            of them, through which the target's hidden states go before the heads read them.
        heads: Heads that draft from the target model's hidden states, without a pass of its stack; None where the stack
            drafts.
        token_ids: ``[n]``, the draft vocabulary, ascending; None for the whole one.

    Raises:
        InvalidInputError: There are heads together with bridges or draft layers, or a layer that replaces nothing
            without heads.
    """

    bridges: Sequence[Bridge]
    layers: Sequence[DraftLayer]
    heads: DraftHeads | None
    token_ids: Tensor | None

    def __init__(
        self,
        *,
        bridges: Iterable[Bridge] = (),
        layers: Iterable[DraftLayer] = (),
        heads: DraftHeads | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bridges = cast("Sequence[Bridge]", nn.ModuleList(bridges))
        self.layers = cast("Sequence[DraftLayer]", nn.ModuleList(layers))
        self.heads = heads
        self.register_buffer(_VOCABULARY, token_ids)
        after_all = [layer for layer in self.layers if layer.start == layer.stop]
        if heads is None and after_all:
            raise InvalidInputError(
                f"draft layer: the one at sublayer {after_all[0].start} replaces no sublayer; only draft heads have "
                "such a layer, and there are none"
            )
        if heads is not None and (self.bridges or len(after_all) < len(self.layers)):
            raise InvalidInputError("draft heads: a draft with heads cannot also have bridges or draft layers")
        if len(after_all) > 1:
            raise InvalidInputError(f"draft heads: expected one layer before them at most, found {len(after_all)}")

    @property
    def steps(self) -> dict[int, Step]:
        """What runs in place of runs of skipped sublayers, by the index of each run's first."""
        steps: list[Bridge | DraftLayer] = [*self.bridges, *self.layers]
        return {step.start: step for step in steps}

    @property
    def prefix_layer(self) -> DraftLayer | None:
        """The layer that hidden states go through before the heads read them; None where there is none."""
        return self.layers[0] if self.heads is not None and self.layers else None

    def placed_on(self, model: LayerSkipModel) -> DraftWeights:
        """The same on the model's device and in its dtype: itself where it is there, else a copy."""
        placed = all(tensor.device == model.device for tensor in self.state_dict().values())
        here = placed and all(weight.dtype == model.dtype for weight in self.parameters())
        return self if here else copy.deepcopy(self).to(model.device, model.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All weights by their names in a profile's file, in main memory; not copied where they are there."""
        named = {} if self.token_ids is None else {_VOCABULARY: self.token_ids.to(torch.int32)}
        for bridge in self.bridges:
            named |= _prefixed(f"bridge.{bridge.start}.{bridge.stop}", bridge)
        for layer in self.layers:
            named |= _prefixed(f"layer.{layer.start}.{layer.stop}.{layer.like}", layer.layer)
        if self.heads is not None:
            named |= _prefixed(self.heads.kind, self.heads)
        return {name: tensor.cpu().contiguous() for name, tensor in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], model: LayerSkipModel) -> DraftWeights:
        """The inverse of :meth:`tensors`; the weights are these very tensors.

        Raises:
            InvalidInputError: They are something else, or for another model.
        """
        bridges: list[Bridge] = []
        layers: list[DraftLayer] = []
        heads: list[DraftHeads] = []
        for name, weights in tensors_by_module(tensors).items():
            kind, *numbers = name.split(".")
            match kind:
                case "bridge":
                    start, stop = map(int, numbers)
                    bridges.append(Bridge.from_tensors(start, stop, weights))
                case "layer":
                    start, stop, like = map(int, numbers)
                    layers.append(DraftLayer(model, start, stop, like, weights))
                case _:
                    heads.append(_heads(cast("HeadKind", kind), weights, model))
        if len(heads) > 1:
            raise InvalidInputError("draft heads: there are medusa and hydra heads; expected one kind")
        ids = tensors.get(_VOCABULARY)
        return cls(
            bridges=sorted(bridges, key=lambda bridge: bridge.start),
            layers=sorted(layers, key=lambda layer: layer.start),
            heads=heads[0] if heads else None,
            token_ids=None if ids is None else ids.long(),
        )


def tensors_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a profile's file but the vocabulary, by module (``bridge.2.5``) and by name in the module.

    Raises:
        InvalidInputError: A name is not that of a draft's tensor.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name == _VOCABULARY:
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidInputError(f"not the tensors of a draft: {name}")
        modules.setdefault(match["module"], {})[match["tensor"]] = tensor
    return modules


def draft_layer_ref(tensors: Mapping[str, Tensor], top: int) -> DraftLayerRef | None:
    """Which draft layer or bridge runs in place of everything above an early exit; None if none does.

    Args:
        tensors: By their names in a profile's file.
        top: Number of sublayers of the model.
    """
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(_REPLACING) and _stop(name) == top}
    if not own:
        return None
    kind, start, *_ = max(own).split(".")  # of both kinds, the layer
    ids = {_VOCABULARY: tensors[_VOCABULARY]} if _VOCABULARY in tensors else {}
    return DraftLayerRef(
        int(start),
        top,
        "layer" if kind == "layer" else "bridge",
        sum(map(len, ids.values())),
        hashlib.sha256(save(own | ids)).hexdigest()[:_DIGITS],
    )


def _stop(name: str) -> int:
    return int(name.split(".")[2])


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _heads(kind: HeadKind, weights: Mapping[str, Tensor], model: LayerSkipModel) -> DraftHeads:
    count = len({name.partition(".")[0] for name in weights}) if kind == "hydra" else len(weights.get("bias", ()))
    heads = empty_heads(kind, count, int(model.config.hidden_size))
    load_weights(heads, weights, "draft heads")
    return heads
