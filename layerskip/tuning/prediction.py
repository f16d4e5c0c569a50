"""What a draft could gain, from its acceptance rate and its cost alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from layerskip.drafts.bridges import Bridge
from layerskip.drafts.heads import DraftHeads
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.stack import Stack, Step
from layerskip.stack.sublayers import AttentionSublayer, LayerStandIn, MLPSublayer

LONGEST = 16


def ideal_speedup(top: Sequence[Mapping[int, float]], costs: Sequence[float]) -> float:
    """The speedup of the best draft of a fixed length and number of branches, if verifying costs one plain step.

    A place of a draft stands by any of its branches, but drafting went on behind the first alone.

    Args:
        top: For each place of a draft how often the full model's choice is among the best ``k`` tokens there where the
            first tokens of the places before stand, by ``k``.
        costs: Of drafts of one place, of two and so on, in plain decoding steps.
    """
    best, tokens, standing = 0.0, 1.0, 1.0
    for within, cost in zip(top, costs, strict=True):
        tokens += standing * max(within.values())
        standing *= within[1]
        best = max(best, tokens / (1 + cost))
    return best


def step_cost_by_weights(model: LayerSkipModel, stack: Stack) -> float:
    """The cost of a draft step as the share of the full model's weights that it reads."""
    steps = sum(_num_weights(step) for _, step in stack.steps)
    return (steps + _scoring_weights(model, stack)) / _full_weights(model)


def head_costs_by_weights(
    model: LayerSkipModel, heads: DraftHeads, stack: Stack, prefix: LayerStandIn | None = None
) -> list[float]:
    """The costs of drafts with one head, with two and so on, as shares of the full model's weights that they read.

    Args:
        model: The model.
        heads: The heads.
        stack: Any of the model's, with the draft vocabulary.
        prefix: The layer that they read through, once a draft; None where there is none.
    """
    scoring, full = _scoring_weights(model, stack), _full_weights(model)
    first = 0 if prefix is None else _num_weights(prefix)
    return [(first + heads.weights_read(places, scoring)) / full for places in range(1, heads.count + 1)]


def _scoring_weights(model: LayerSkipModel, stack: Stack) -> int:
    return _head_weights(model) if stack.head_rows is None else stack.head_rows.numel()


def _full_weights(model: LayerSkipModel) -> int:
    return sum(sublayer.num_weights for sublayer in model.sublayers) + _head_weights(model)


def _head_weights(model: LayerSkipModel) -> int:
    head: nn.Module = model.hf_model.get_output_embeddings()
    return sum(weight.numel() for weight in head.parameters())


def _num_weights(step: Step) -> int:
    match step:
        case AttentionSublayer() | MLPSublayer():
            return step.num_weights
        case LayerStandIn():
            return step.attention.num_weights + step.mlp.num_weights
        case Bridge():
            return sum(factor.numel() for factor in step.factors) + step.bias.numel()
    raise TypeError(f"what {type(step).__name__} reads is not known")
