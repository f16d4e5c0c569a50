"""The tensors of a draft, beside its profile: stand-ins, draft heads and draft vocabulary, as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from layerskip.drafting.bridges import Bridge
from layerskip.drafting.draft_layer import DraftLayerWeights
from layerskip.drafting.heads import HEAD_KINDS, DraftHeads, heads_of
from layerskip.errors import InvalidInputError
from layerskip.sublayers import DraftLayerStep, Step

if TYPE_CHECKING:
    from layerskip.model import LayerSkipModel


@dataclass(frozen=True, eq=False)
class DraftWeights:
    """What a draft needs besides the model's own weights.

    Args:
        bridges: By the index of their first sublayer.
        token_ids: ``[n]``, the draft vocabulary, ascending; None for the whole one.
        layers: Trained decoder layers, by the index of the first sublayer that they stand for. Where heads draft: none,
            or one that stands behind all sublayers and for none of them, which the heads' hidden states go through
            first.
        heads: Heads that draft behind the target model, without a pass of its stack; None where the stack drafts.

    Raises:
        InvalidInputError: There are both heads and stand-ins, or a layer that stands for nothing without heads.
    """

    bridges: Mapping[int, Bridge] = field(default_factory=dict)
    token_ids: Tensor | None = None
    layers: Mapping[int, DraftLayerWeights] = field(default_factory=dict)
    heads: DraftHeads | None = None

    def __post_init__(self) -> None:
        behind = [layer for layer in self.layers.values() if layer.start == layer.stop]
        if self.heads is None and behind:
            raise InvalidInputError(
                f"stand-in: the layer at sublayer {behind[0].start} stands for no sublayer; only draft heads have such "
                "a layer, and there are none"
            )
        if self.heads is not None and (self.bridges or len(behind) < len(self.layers)):
            raise InvalidInputError("draft heads: nothing of the stack runs to draft, so nothing can stand in for it")
        if len(behind) > 1:
            raise InvalidInputError(f"draft heads: expected one layer before them at most, found {len(behind)}")

    def __bool__(self) -> bool:
        return bool(self.bridges or self.layers) or self.token_ids is not None or self.heads is not None

    def to_bytes(self) -> bytes:
        """The content of a safetensors file."""
        tensors = {} if self.token_ids is None else {"token_ids": self.token_ids.to(torch.int32)}
        for bridge in self.bridges.values():
            name = f"bridge.{bridge.start}.{bridge.stop}"
            tensors[f"{name}.bias"] = bridge.bias
            tensors |= {f"{name}.factor.{number}": factor for number, factor in enumerate(bridge.factors)}
        for layer in self.layers.values():
            name = f"layer.{layer.start}.{layer.stop}.{layer.like}"
            tensors |= {f"{name}.{weight}": tensor for weight, tensor in layer.weights.items()}
        if self.heads is not None:
            tensors |= self.heads.tensors()
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> DraftWeights:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: The content is something else.
        """
        try:
            tensors = load(content)
            token_ids = tensors.pop("token_ids", None)
            layers = _layers({name: tensor for name, tensor in tensors.items() if name.startswith("layer.")})
            heads = heads_of(tensors)
            others = tuple(f"{kind}." for kind in ("layer", *HEAD_KINDS))
            rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}
            ends = {tuple(int(part) for part in name.split(".")[1:3]) for name in rest}
            bridges = {start: _bridge(rest, start, stop) for start, stop in sorted(ends)}
            return cls(bridges, None if token_ids is None else token_ids.long(), layers, heads)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"not the tensors of a draft: {error}") from error

    def to(self, like: Tensor) -> DraftWeights:
        """The assets on the device of a tensor, stand-ins and heads in its dtype."""
        bridges = {start: bridge.to(like) for start, bridge in self.bridges.items()}
        layers = {start: layer.to(like) for start, layer in self.layers.items()}
        token_ids = None if self.token_ids is None else self.token_ids.to(like.device)
        return DraftWeights(bridges, token_ids, layers, None if self.heads is None else self.heads.to(like))

    def stand_ins(self, model: LayerSkipModel) -> dict[int, Step]:
        """What runs in place of runs of skipped sublayers, by the index of the run's first.

        Args:
            model: The model, to whose device and dtype the assets were brought.

        Raises:
            InvalidInputError: A layer's weights are not those of a layer of this model.
        """
        built = {start: self.layers[start].build(model, number) for number, start in enumerate(sorted(self.layers))}
        return {**self.bridges, **built}

    def prefix(self, model: LayerSkipModel) -> DraftLayerStep | None:
        """The layer that hidden states go through before the heads read them; None where there is none.

        Args:
            model: The model, to whose device and dtype the assets were brought.

        Raises:
            InvalidInputError: It does not stand behind this model's sublayers, or as in :meth:`stand_ins`.
        """
        if self.heads is None or not self.layers:
            return None
        [weights] = self.layers.values()
        if weights.start != len(model.sublayers):
            raise InvalidInputError(
                f"draft heads: their layer stands behind {weights.start} sublayers, but the model has "
                f"{len(model.sublayers)}; train heads for this model with 'layerskip tune'"
            )
        return weights.build(model, number=0)


def _bridge(tensors: Mapping[str, Tensor], start: int, stop: int) -> Bridge:
    name = f"bridge.{start}.{stop}"
    factors = sorted(key for key in tensors if key.startswith(f"{name}.factor."))
    return Bridge(start, stop, tuple(tensors[key] for key in factors), tensors[f"{name}.bias"])


def _layers(tensors: Mapping[str, Tensor]) -> dict[int, DraftLayerWeights]:
    """By the index of the first sublayer that they stand for; names begin with ``layer.START.STOP.LIKE.``."""
    weights: dict[tuple[int, int, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, start, stop, like, weight = name.split(".", maxsplit=4)
        weights.setdefault((int(start), int(stop), int(like)), {})[weight] = tensor
    return {layer[0]: DraftLayerWeights(*layer, weights[layer]) for layer in sorted(weights)}
