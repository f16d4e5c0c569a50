"""From a draft configuration to a drafter."""

from __future__ import annotations

from layerskip.checks import instance
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.drafter import Drafter
from layerskip.drafting.head_drafter import HeadDrafter
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.prompt_lookup import FallbackDrafter, PromptLookupDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.model import LayerSkipModel


def make_drafter(model: LayerSkipModel, config: DraftConfig, weights: DraftWeights | None = None) -> Drafter:
    """A drafter for :func:`layerskip.generate`: with heads where the weights have some, else with the model's stack.

    With prompt lookup, it drafts only where nothing can be copied from the text.

    Args:
        model: The model that will verify.
        config: How to draft.
        weights: Bridges, draft layers, draft heads and draft vocabulary; None without any.

    Raises:
        InvalidInputError: The configuration or the weights are for another model.
    """
    instance("model", model, LayerSkipModel, "; wrap it: LayerSkipModel(model)")
    instance("config", config, DraftConfig)
    drafter: Drafter
    if weights is not None and weights.heads is not None:
        drafter = HeadDrafter(model, config, weights)
    else:
        drafter = LayerSkipDrafter(model, config, weights)
    if config.prompt_lookup is None:
        return drafter
    return FallbackDrafter(PromptLookupDrafter(config.prompt_lookup), drafter)
