"""The reference run: what the full model writes, and what drafts learn from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerskip.decoding.drafting import SkipDrafter
from layerskip.decoding.loop import generate
from layerskip.drafts.assets import DraftAssets
from layerskip.drafts.bridges import BridgeFitter, record_states
from layerskip.drafts.vocabulary import draft_vocabulary, emission_frequencies
from layerskip.stack.model import LayerSkipModel
from search.prompts import EncodedPrompt
from search.space import Candidate

# Enough for a bridge of a small model, and under a minute on two processor cores.
_TOKENS = 600


class Reference:
    """The full model's own continuations of the search's prompts, read once for its states and its choices.

    Args:
        model: The model.
        prompts: What to continue.
        max_new_tokens: Most tokens for each prompt.
    """

    def __init__(self, model: LayerSkipModel, prompts: Sequence[EncodedPrompt], *, max_new_tokens: int) -> None:
        length = min(max_new_tokens, math.ceil(_TOKENS / len(prompts)))
        texts = [[*p.tokens, *generate(model, p.tokens, max_new_tokens=length).tokens] for p in prompts]
        states = record_states(model, texts)
        self._model = model
        self._fitter = BridgeFitter(model, states)
        self._frequencies = emission_frequencies(model, states[-1])

    def assets(self, candidate: Candidate) -> DraftAssets:
        """The bridges and the draft vocabulary that a candidate asks for."""
        bridges = self._fitter.fit(candidate.skip_set) if candidate.bridged else {}
        token_ids = None
        if candidate.vocabulary:
            token_ids = draft_vocabulary(self._frequencies, self._model.eos_token_ids, candidate.vocabulary)
        return DraftAssets(bridges, token_ids)


def drafter_of(model: LayerSkipModel, candidate: Candidate, assets: DraftAssets) -> SkipDrafter:
    """The drafter of a candidate."""
    return SkipDrafter.of(model, candidate.skip_set, candidate.draft_exit, assets, gate=candidate.gate)
