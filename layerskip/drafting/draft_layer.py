"""One decoder layer of a draft's own: in place of a run of skipped sublayers, as in Kangaroo (arXiv 2404.18911), or
behind them all and before draft heads, as in Hydra++ (arXiv 2402.05109)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerskip.errors import InvalidInputError
from layerskip.sublayers import DraftLayerStep, sublayers_in

if TYPE_CHECKING:
    from layerskip.model import LayerSkipModel


@dataclass(frozen=True, eq=False)
class DraftLayerWeights:
    """The weights of a decoder layer that runs instead of sublayers ``start`` to ``stop - 1``.

    Args:
        start: Index of the first sublayer that it stands for.
        stop: Index behind the last; ``start`` itself where it stands for none, behind all sublayers.
        like: The model's layer that it is built like: in some families layers differ, such as by their window.
        weights: By their names in that layer.
    """

    start: int
    stop: int
    like: int
    weights: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def copied(cls, model: LayerSkipModel, start: int, stop: int, like: int) -> DraftLayerWeights:
        """The weights of one of the model's own layers, to start from.

        Raises:
            InvalidInputError: They are quantized or adapted, so that nothing can be trained from them.
        """
        layer = _layers(model)[like]
        weights = {name: weight.detach().clone() for name, weight in layer.state_dict().items()}
        expected = {name: weight.shape for name, weight in _empty_layer(model, like).state_dict().items()}
        if expected != {name: weight.shape for name, weight in weights.items() if weight.is_floating_point()}:
            raise InvalidInputError(
                f"layer {like}: its weights are quantized or adapted; tune the model that it was made from"
            )
        return cls(start, stop, like, weights)

    @classmethod
    def behind(cls, model: LayerSkipModel) -> DraftLayerWeights:
        """A layer behind all sublayers that leaves hidden states as they are, to start from.

        It is a copy of the top layer, in which the last thing that each sublayer goes through answers nothing: the norm
        behind it, or where the family has none, its output projection.

        Raises:
            InvalidInputError: As :meth:`copied`.
        """
        top, end = model.num_layers - 1, len(model.sublayers)
        copied = cls.copied(model, end, end, top)
        layer = copied.module(model, slot=0)  # its parameters are the copied weights
        norms = model.family.norms
        for norm, projection in (
            (norms.after_attention, "self_attn.o_proj"),
            (norms.after_mlp, "mlp.down_proj"),
        ):
            with torch.no_grad():
                if norm is None:
                    for weight in layer.get_submodule(projection).parameters():
                        weight.zero_()
                else:
                    # Not the projection: a norm makes as much of next to nothing as of anything.
                    _silence(layer.get_submodule(norm))
        return copied

    def to(self, like: Tensor) -> DraftLayerWeights:
        """The weights in the dtype and on the device of a tensor."""
        weights = {name: weight.to(like.device, like.dtype) for name, weight in self.weights.items()}
        return DraftLayerWeights(self.start, self.stop, self.like, weights)

    def module(self, model: LayerSkipModel, slot: int) -> nn.Module:
        """A decoder layer of the model's own kind with these weights, which it shares and does not copy.

        Args:
            model: The model.
            slot: Where in the cache its attention keeps keys and values.

        Raises:
            InvalidInputError: The weights are not those of a layer of this model.
        """
        if not 0 <= self.like < model.num_layers:
            raise InvalidInputError(f"stand-in: is like layer {self.like}, but the model has {model.num_layers} layers")
        layer = _empty_layer(model, self.like)
        try:
            layer.load_state_dict(dict(self.weights), assign=True)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise InvalidInputError(f"stand-in: its weights do not fit a layer of this model: {reason}") from error
        layer.get_submodule("self_attn").layer_idx = slot  # type: ignore[assignment]
        return layer.eval()

    def build(self, model: LayerSkipModel, number: int) -> DraftLayerStep:
        """What runs in a draft's stack.

        Args:
            model: The model, to whose device and dtype the weights were brought.
            number: Which of the draft's own layers it is, from 0.

        Raises:
            InvalidInputError: As :meth:`module`.
        """
        return draft_layer_step(model, self.module(model, model.num_layers + number), self.like)


def draft_layer_step(model: LayerSkipModel, layer: nn.Module, like: int) -> DraftLayerStep:
    """A decoder layer as a step of a stack.

    Args:
        model: The model.
        layer: The layer, of the model's own kind.
        like: The model's layer that it is built like.
    """
    return DraftLayerStep(*sublayers_in(layer, like, model.family, model.config))


def _silence(norm: nn.Module) -> None:
    """Let a norm answer nothing: some families' norms multiply by their weight, others by 1 and their weight."""
    [weight] = norm.parameters()
    weight.zero_()
    if norm(torch.ones_like(weight)).any():
        weight.fill_(-1)


def _layers(model: LayerSkipModel) -> Any:
    decoder: Any = model.hf_model.base_model
    return decoder.layers


def _empty_layer(model: LayerSkipModel, like: int) -> nn.Module:
    """A layer of the model's kind without memory for weights."""
    with torch.device("meta"):
        layer: nn.Module = type(_layers(model)[like])(model.config, like)
    return layer
