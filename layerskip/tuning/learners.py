"""What is trained: something that stands in for a run of skipped sublayers, with the tensors to be learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerskip.drafts.assets import DraftAssets
from layerskip.drafts.bridges import Bridge
from layerskip.drafts.layers import LayerWeights, stand_in_of
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.stack import Step


@dataclass(frozen=True)
class Learner:
    """A stand-in to be trained, in float32 whatever the model's dtype is.

    Args:
        start: Index of the first sublayer that it stands for.
        stop: Index behind the last.
        step: What runs.
        parameters: What is learned, by name; the step computes with these very tensors.
        assets: The draft's tensors, made of other values of the parameters.
    """

    start: int
    stop: int
    step: Step
    parameters: Mapping[str, nn.Parameter]
    assets: Callable[[Mapping[str, Tensor]], DraftAssets]


def layer_learner(model: LayerSkipModel, weights: LayerWeights) -> Learner:
    """A decoder layer, from the weights to start with."""
    like = torch.empty(0, device=model.device)
    layer = weights.to(like).module(model, slot=model.num_layers)

    def assets(values: Mapping[str, Tensor]) -> DraftAssets:
        return DraftAssets(layers={weights.start: LayerWeights(weights.start, weights.stop, weights.like, values)})

    step = stand_in_of(model, layer, weights.like)
    return Learner(weights.start, weights.stop, step, dict(layer.named_parameters()), assets)


def bridge_learner(model: LayerSkipModel, bridge: Bridge) -> Learner:
    """An affine map, from the closed-form solution."""
    like = torch.empty(0, device=model.device)
    bridge = bridge.to(like)
    factors = tuple(nn.Parameter(factor.clone()) for factor in bridge.factors)
    bias = nn.Parameter(bridge.bias.clone())

    def assets(values: Mapping[str, Tensor]) -> DraftAssets:
        learned = tuple(values[f"factor.{number}"] for number in range(len(factors)))
        return DraftAssets({bridge.start: Bridge(bridge.start, bridge.stop, learned, values["bias"])})

    named = {f"factor.{number}": factor for number, factor in enumerate(factors)} | {"bias": bias}
    return Learner(bridge.start, bridge.stop, Bridge(bridge.start, bridge.stop, factors, bias), named, assets)
