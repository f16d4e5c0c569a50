"""What a draft could gain, from its acceptance rate and its cost alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from layerskip.drafts.bridges import Bridge
from layerskip.formula import best_speedup
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.stack import Stack, Step
from layerskip.stack.sublayers import AttentionSublayer, LayerStandIn, MLPSublayer

_LONGEST = 16


def speedup(acceptance: float, step_cost: float, verification: Callable[[int], float] = lambda tokens: 1.0) -> float:
    """The speedup of drafting chains of the best fixed length: tokens of a round ÷ its cost in plain steps.

    Args:
        acceptance: α, the one-step acceptance rate, from 0 to 1.
        step_cost: Cost of a draft step, in plain decoding steps.
        verification: Cost of verifying in a pass of so many tokens, likewise; by default that of one token.
    """
    return best_speedup(acceptance, step_cost, verification, _LONGEST)


def step_cost_by_weights(model: LayerSkipModel, stack: Stack) -> float:
    """The cost of a draft step as the share of the full model's weights that it reads."""
    head: nn.Module = model.hf_model.get_output_embeddings()
    whole_head = sum(weight.numel() for weight in head.parameters())
    own_head = whole_head if stack.head_rows is None else stack.head_rows.numel()
    full = sum(sublayer.num_weights for sublayer in model.sublayers) + whole_head
    return (sum(_num_weights(step) for _, step in stack.steps) + own_head) / full


def _num_weights(step: Step) -> int:
    match step:
        case AttentionSublayer() | MLPSublayer():
            return step.num_weights
        case LayerStandIn():
            return step.attention.num_weights + step.mlp.num_weights
        case Bridge():
            return sum(factor.numel() for factor in step.factors) + step.bias.numel()
    raise TypeError(f"what {type(step).__name__} reads is not known")
