"""What candidates' drafts are made of: bridges and draft vocabularies, fitted to reference texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from layerskip.decoding.drafting import Drafter, SkipDrafter
from layerskip.decoding.ngrams import behind_copies
from layerskip.drafts.assets import DraftAssets
from layerskip.drafts.bridges import BridgeFitter, without_outliers
from layerskip.drafts.vocabulary import draft_vocabulary, emission_frequencies
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from layerskip.stack.stack import Stack
from search.prompts import EncodedPrompt
from search.reference import ReferenceRun, ReferenceText
from search.space import Candidate, Policy

# Positions of hidden states that bridges are fitted to, over all texts.
_FIT_POSITIONS = 2048


def fit_texts(run: ReferenceRun, prompts: Sequence[EncodedPrompt], *, max_new_tokens: int) -> list[ReferenceText]:
    """The texts that drafts learn from, with hidden states at positions all over them."""
    return run.texts(prompts, max_new_tokens=max_new_tokens, states=max(_FIT_POSITIONS // len(prompts), 1))


class AssetMaker:
    """Makes what candidates ask for.

    Args:
        model: The model.
        texts: What the full model wrote, with hidden states at positions all over them.
    """

    def __init__(self, model: LayerSkipModel, texts: Sequence[ReferenceText]) -> None:
        states = without_outliers(torch.cat([text.states for text in texts], dim=1).to(model.device))
        self._model = model
        self._fitter = BridgeFitter(model, states)
        self._frequencies = emission_frequencies(model, states[-1])
        self._heads: dict[int, Stack] = {}

    def assets(self, candidate: Candidate) -> DraftAssets:
        """The bridges and the draft vocabulary that a candidate asks for."""
        bridges = self._fitter.fit(candidate.skip_set) if candidate.bridged else {}
        return DraftAssets(bridges, self._head(candidate.vocabulary).token_ids)

    def _head(self, vocabulary: int) -> Stack:
        """The full stack with the head of a draft vocabulary; made once, because its rows are copied."""
        if vocabulary not in self._heads:
            special = self._model.eos_token_ids
            ids = draft_vocabulary(self._frequencies, special, vocabulary) if vocabulary else None
            self._heads[vocabulary] = self._model.stack_of(SkipSet(self._model.num_layers), token_ids=ids)
        return self._heads[vocabulary]

    def num_bridges(self, skip_set: SkipSet) -> int:
        """How many bridges a bridged candidate gets."""
        return len(self._fitter.worthy_runs(skip_set))

    def stack(self, candidate: Candidate) -> Stack:
        """The stack of a candidate's draft."""
        stack = self._model.stack_of(candidate.skip_set, stand_ins=self.assets(candidate).bridges)
        head = self._head(candidate.vocabulary)
        return replace(stack, token_ids=head.token_ids, head_rows=head.head_rows)

    def drafter(self, candidate: Candidate, policy: Policy) -> Drafter:
        """The drafter of a candidate that drafts by a policy."""
        drafter = SkipDrafter.of(
            self._model,
            candidate.skip_set,
            policy.draft_exit,
            self.assets(candidate),
            gate=policy.gate,
            branches=policy.branches,
        )
        return behind_copies(policy.ngrams, drafter)
