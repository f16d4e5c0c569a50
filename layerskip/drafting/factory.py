"""From a draft configuration to a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from layerskip.checks import instance, shown
from layerskip.costs import DraftRoundCosts
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.controller import ControlledDrafter
from layerskip.drafting.drafter import Drafter
from layerskip.drafting.head_drafter import HeadDrafter
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.prompt_lookup import PromptLookupDrafter
from layerskip.drafting.suffix_automaton import SuffixAutomaton
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel


def make_drafter(
    model: LayerSkipModel,
    config: DraftConfig,
    weights: DraftWeights | None = None,
    *,
    costs: DraftRoundCosts | None = None,
    corpus: Sequence[int] | None = None,
) -> Drafter:
    """A drafter for :func:`layerskip.generate`: with heads where the weights have some, else with the model's stack.

    With prompt lookup, it drafts only where nothing can be copied from the text, and copies continue what it drafts.

    Args:
        model: The model that will verify.
        config: How to draft.
        weights: Bridges, draft layers, draft heads and draft vocabulary; None without any.
        costs: What its rounds cost; with them, drafting and copying pause where they do not pay. Such a drafter learns
            from every text, so that with one seed a text may differ from the same text after others.
        corpus: Token ids of a text to copy from, too, by the configuration's prompt lookup or the default one; None
            without one.

    Raises:
        InvalidInputError: The configuration or the weights are for another model, or the corpus has other token ids.
    """
    instance("model", model, LayerSkipModel, "; wrap it: LayerSkipModel(model)")
    instance("config", config, DraftConfig)
    drafter: Drafter
    if weights is not None and weights.heads is not None:
        drafter = HeadDrafter(model, config, weights)
    else:
        drafter = LayerSkipDrafter(model, config, weights)
    if costs is not None:
        drafter = ControlledDrafter(drafter, costs)
    if corpus is not None:
        known = SuffixAutomaton()
        known.extend(_checked_ids(corpus, model.vocab_size))
        return PromptLookupDrafter(config.prompt_lookup, drafter, costs, known)
    return drafter if config.prompt_lookup is None else PromptLookupDrafter(config.prompt_lookup, drafter, costs)


def _checked_ids(corpus: Any, vocab_size: int) -> list[int]:
    """Token ids that were given as a row of numbers, of Python's, numpy's or torch's types."""
    try:
        ids = [index(token) for token in (corpus.tolist() if hasattr(corpus, "tolist") else corpus)]
    except TypeError as error:
        raise InvalidInputError(f"corpus: expected a row of token ids, got {shown(corpus)}") from error
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InvalidInputError(f"corpus: token id {wrong} is outside the vocabulary, 0 to {vocab_size - 1}")
    return ids
