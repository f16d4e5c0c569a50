"""Draft layers: one decoder layer of the draft's own.

It runs in place of a run of skipped sublayers, as in Kangaroo (arXiv 2404.18911), or after all of them and before draft
heads, as in Hydra++ (arXiv 2402.05109).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.sublayers import PassContext, sublayers_in


class DraftLayer(nn.Module):
    """A decoder layer of the model's own kind in place of sublayers ``start`` to ``stop - 1``.

    Its attention keeps keys and values in a slot of the cache after those of the model's layers.

    Args:
        model: The model.
        start: Index of the first sublayer that it replaces.
        stop: Index after the last; ``start`` itself where it replaces none, after all sublayers.
        like: The model's layer that it is built like: in some families layers differ, such as by their window.
        weights: By their names in that layer; used as they are, not copied.

    Raises:
        InvalidInputError: The weights are not those of a layer of this model.
    """

    remembers: ClassVar = True

    def __init__(self, model: LayerSkipModel, start: int, stop: int, like: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        if not 0 <= like < model.num_layers:
            raise InvalidInputError(
                f"draft layer: is built like layer {like}, but the model has {model.num_layers} layers"
            )
        self.start, self.stop, self.like = start, stop, like
        self.layer = _empty_layer(model, like).eval().requires_grad_(False)
        load_weights(self.layer, weights, "draft layer")
        self.layer.get_submodule("self_attn").layer_idx = model.num_layers + start  # type: ignore[assignment]
        self.attention, self.mlp = sublayers_in(self.layer, like, model.family, model.config)

    @classmethod
    def copied(cls, model: LayerSkipModel, start: int, stop: int, like: int) -> DraftLayer:
        """A copy of one of the model's own layers, to start training from.

        Raises:
            InvalidInputError: Its weights are quantized or adapted, so that nothing can be trained from them.
        """
        layer = _layers(model)[like]
        weights = {name: weight.detach().clone() for name, weight in layer.state_dict().items()}
        expected = {name: weight.shape for name, weight in _empty_layer(model, like).state_dict().items()}
        if expected != {name: weight.shape for name, weight in weights.items() if weight.is_floating_point()}:
            raise InvalidInputError(
                f"layer {like}: its weights are quantized or adapted; tune the model that it was made from"
            )
        return cls(model, start, stop, like, weights)

    @classmethod
    def identity(cls, model: LayerSkipModel) -> DraftLayer:
        """A layer after all sublayers that leaves hidden states as they are, to start training from.

        It is a copy of the top layer in which the last module of each sublayer outputs 0: the norm after it, or where
        the family has none, its output projection.

        Raises:
            InvalidInputError: As :meth:`copied`.
        """
        end = len(model.sublayers)
        copied = cls.copied(model, end, end, model.num_layers - 1)
        norms = model.family.norms
        for norm, projection in ((norms.after_attention, "self_attn.o_proj"), (norms.after_mlp, "mlp.down_proj")):
            if norm is not None:
                # Not the projection: a norm scales next to nothing up to as much as anything.
                _zero_norm(copied.layer.get_submodule(norm))
                continue
            for weight in copied.layer.get_submodule(projection).parameters():
                weight.zero_()
        return copied

    @property
    def num_weights(self) -> int:
        return self.attention.num_weights + self.mlp.num_weights

    def forward(self, x: Tensor, context: PassContext) -> Tensor:
        """As :class:`layerskip.sublayers.Step`."""
        return self.mlp(self.attention(x, context), context)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Give a module weights by their names, as they are, in their dtype and on their device.

    Args:
        module: The module, which may be without memory for weights.
        weights: All of them.
        what: What to call the module in an error.

    Raises:
        InvalidInputError: Names or shapes are not those of the module.
    """
    try:
        module.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()  # the first problem, after a line that names the class
        raise InvalidInputError(f"{what}: the weights do not fit this model: {reason}") from error


def _zero_norm(norm: nn.Module) -> None:
    """Make a norm output 0: some families' norms multiply by their weight, others by 1 and their weight."""
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
