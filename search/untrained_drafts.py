"""Kinds of drafts that can be trained, and their weights before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from layerskip.drafting.bridges import Bridge, fit_bridge
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.heads import HEAD_KINDS, HeadKind, untrained_heads
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from layerskip.training import Agreement, TrainingTexts
from layerskip.training.evaluation import LONGEST, head_costs_by_weights, ideal_speedup, step_cost_by_weights

HeadsKind = HeadKind | Literal["hydra++"]
HEADS_KINDS: tuple[HeadsKind, ...] = (*HEAD_KINDS, "hydra++")
Kind = Literal["layer", "bridge"] | HeadsKind
KINDS: tuple[Kind, ...] = ("layer", "bridge", *HEADS_KINDS)

# Positions that a bridge is fitted to before it is trained.
_BRIDGE_POSITIONS = 8192


def untrained_weights(
    model: LayerSkipModel, kind: Kind, *, exit: int, heads: int, texts: TrainingTexts, seed: int
) -> DraftWeights:
    """The weights that training starts with.

    Args:
        model: The model.
        kind: ``layer``: a copy of the model's top layer; ``bridge``: the affine map in closed form; ``medusa`` or
            ``hydra``: random draft heads; ``hydra++``: Hydra's heads after a layer that changes nothing.
        exit: Layers that a draft with a draft layer or a bridge keeps.
        heads: Number of draft heads.
        texts: What to fit a bridge to, with states at the exit and at the top.
        seed: Of random weights.
    """
    start, top = 2 * exit, len(model.sublayers)
    match kind:
        case "layer":
            # The top layer knows best what the head expects.
            return DraftWeights(layers=[DraftLayer.copied(model, start, top, model.num_layers - 1)])
        case "bridge":
            return DraftWeights(bridges=[_fitted_bridge(model, texts, start, top)])
        case "hydra++":
            random = untrained_heads("hydra", heads, int(model.config.hidden_size), seed=seed)
            return DraftWeights(layers=[DraftLayer.identity(model)], heads=random)
        case "medusa" | "hydra":
            return DraftWeights(heads=untrained_heads(kind, heads, int(model.config.hidden_size), seed=seed))


def _fitted_bridge(model: LayerSkipModel, texts: TrainingTexts, start: int, stop: int) -> Bridge:
    below: list[Tensor] = []
    above: list[Tensor] = []
    stride = max(texts.positions // _BRIDGE_POSITIONS, 1)
    for text in texts.learned():
        below.append(text.states[0, text.draft_positions][::stride])
        above.append(text.states[1, text.draft_positions][::stride])
    before, after = (torch.cat(states).to(model.device, torch.float32) for states in (below, above))
    return fit_bridge(before, after, start, stop)


def ideal_speedups(
    model: LayerSkipModel, weights: DraftWeights, skip_set: SkipSet, token_ids: Tensor | None
) -> Callable[[Agreement], float]:
    """The speedup that an agreement gives if verification costs one plain step, and drafting the weights that it reads.

    Args:
        model: The model.
        weights: The draft's, in training.
        skip_set: Sublayers that it skips.
        token_ids: ``[n]``, the draft vocabulary; None for the whole one.
    """
    stack = model.stack_of(skip_set, stand_ins={} if weights.heads else weights.steps, token_ids=token_ids)
    if weights.heads is not None:
        head_costs = head_costs_by_weights(model, weights.heads, stack, weights.prefix_layer)
        return lambda agreement: ideal_speedup(agreement.by_place, head_costs)
    step = step_cost_by_weights(model, stack)
    costs = [step * length for length in range(1, LONGEST + 1)]
    return lambda agreement: ideal_speedup([agreement.top] * LONGEST, costs)


def exit_of(skip_set: SkipSet) -> int:
    """The layers that a draft with an early exit keeps.

    Raises:
        InvalidInputError: The skip set is no early exit: it keeps something above what it skips.
    """
    match skip_set.runs:
        case ((start, stop),) if stop == 2 * skip_set.num_layers and start % 2 == 0 and start:
            return start // 2
    raise InvalidInputError(
        f"the profile skips {skip_set}, which is no early exit, and only what reaches the top can be tuned; "
        "name an exit with --exit"
    )
