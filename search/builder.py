"""What candidates' drafts are made of: bridges and draft vocabularies, fitted to reference texts, and trained
stand-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layerskip.drafting.bridges import Bridge, BridgeFitter, without_outliers
from layerskip.drafting.drafter import Drafter
from layerskip.drafting.factory import make_drafter
from layerskip.drafting.vocabulary import draft_vocabulary, emission_frequencies
from layerskip.drafting.weights import DraftWeights
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from layerskip.sublayers import Stack, Step
from layerskip.target_texts import TargetText
from search.draft_layers import DraftLayerRef, TrainedDraftLayer
from search.prompts import EncodedPrompt
from search.reference import ReferenceRun
from search.space import Candidate, Policy

# Positions of hidden states that bridges are fitted to, over all texts.
_FIT_POSITIONS = 2048


def fit_texts(run: ReferenceRun, prompts: Sequence[EncodedPrompt], *, max_new_tokens: int) -> list[TargetText]:
    """The texts that drafts learn from, with hidden states at positions all over them."""
    return run.texts(prompts, max_new_tokens=max_new_tokens, states=max(_FIT_POSITIONS // len(prompts), 1))


class DraftBuilder:
    """Makes what candidates ask for.

    Args:
        model: The model.
        texts: What the target model wrote, with hidden states at positions all over them.
        stand_ins: Trained ones that candidates may ask for.
    """

    def __init__(
        self, model: LayerSkipModel, texts: Sequence[TargetText], stand_ins: Sequence[TrainedDraftLayer] = ()
    ) -> None:
        states = without_outliers(torch.cat([text.states for text in texts], dim=1).to(model.device))
        self._model = model
        self._fitter = BridgeFitter(model, states)
        self._frequencies = emission_frequencies(model, states[-1])
        self._heads: dict[tuple[int, DraftLayerRef | None], Stack] = {}
        self._trained = {one.name: one for one in stand_ins}
        self._built = {one.name: one.weights.placed_on(model).steps for one in stand_ins}

    def assets(self, candidate: Candidate) -> DraftWeights:
        """The stand-ins and the draft vocabulary that a candidate asks for; a trained one as it was given."""
        ids = self._head(candidate).token_ids
        bridges = self._bridges(candidate)
        if candidate.stand_in is None:
            return DraftWeights(bridges=bridges, token_ids=ids)
        trained = self._trained[candidate.stand_in].weights
        return DraftWeights(bridges=[*bridges, *trained.bridges], layers=trained.layers, token_ids=ids)

    def training_seconds(self, candidate: Candidate) -> float | None:
        """How long a candidate's stand-in was trained, if it has one and that is known."""
        return None if candidate.stand_in is None else self._trained[candidate.stand_in].training_seconds

    def _bridges(self, candidate: Candidate) -> list[Bridge]:
        return self._fitter.fit(candidate.skipped_below) if candidate.bridged else []

    def _head(self, candidate: Candidate) -> Stack:
        """The full stack with the head of a draft vocabulary; made once, because its rows are copied."""
        size, stand_in = candidate.vocabulary, candidate.stand_in
        own = stand_in if stand_in is not None and 0 < stand_in.vocabulary == size else None
        if (size, own) not in self._heads:
            ids = self._fitted_ids(size) if own is None else self._trained[own].weights.token_ids
            self._heads[size, own] = self._model.stack_of(SkipSet(self._model.num_layers), token_ids=ids)
        return self._heads[size, own]

    def _fitted_ids(self, size: int) -> Tensor | None:
        return draft_vocabulary(self._frequencies, self._model.eos_token_ids, size) if size else None

    def num_bridges(self, skip_set: SkipSet) -> int:
        """How many bridges are fitted for a bridged candidate that leaves this out without a trained stand-in."""
        return len(self._fitter.worthy_runs(skip_set))

    def as_built(self, candidate: Candidate) -> Candidate:
        """The candidate as its draft is built: without bridges where it skips nothing that is worth one."""
        return replace(candidate, bridged=candidate.bridged and self.num_bridges(candidate.skipped_below) > 0)

    def stack(self, candidate: Candidate) -> Stack:
        """The stack of a candidate's draft."""
        stand_ins: dict[int, Step] = {bridge.start: bridge for bridge in self._bridges(candidate)}
        if candidate.stand_in is not None:
            stand_ins |= self._built[candidate.stand_in]
        stack = self._model.stack_of(candidate.skip_set, stand_ins=stand_ins)
        head = self._head(candidate)
        return replace(stack, token_ids=head.token_ids, lm_head_rows=head.lm_head_rows)

    def drafter(self, candidate: Candidate, policy: Policy) -> Drafter:
        """The drafter of a candidate that drafts by a policy."""
        return make_drafter(self._model, policy.config(candidate.skip_set), self.assets(candidate))
