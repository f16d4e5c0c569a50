"""Drafting with the target model's own sublayers, some of them skipped, or with copies at lower precision."""

from __future__ import annotations

import torch
from torch import Tensor

from layerskip.drafting.config import DraftConfig
from layerskip.drafting.drafter import BaseDrafter, RoundResult
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import DraftStep, Engine, SharedPrefix
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sampling import Draft, Sampler


class LayerSkipDrafter(BaseDrafter):
    """Drafts with the model itself, some sublayers skipped, the others as they are or at lower precision.

    Args:
        model: The model that will verify.
        config: How to draft.
        weights: The draft's bridges, draft layers and draft vocabulary.

    Raises:
        InvalidInputError: The skip set or a draft layer is for another model, the tree has lists, or the model cannot
            draft at the precision here.
    """

    def __init__(self, model: LayerSkipModel, config: DraftConfig, weights: DraftWeights | None = None) -> None:
        super().__init__(model, config)
        if any(len(place) > 1 for place in self._widths):
            raise InvalidInputError(
                "tree: only draft heads propose tokens after several tokens of a place; give one number for each place"
            )
        weights = (weights or DraftWeights()).placed_on(model)
        self._stack = model.stack_of(
            config.skip_set, stand_ins=weights.steps, token_ids=weights.token_ids, precision=config.precision
        )

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        super().start(engine, prompt, states)
        self._engine = engine
        self._unseen = prompt  # the text's end, not yet run by a stack with its own cache

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        prefixes: list[Tensor] = []

        def step(tokens: Tensor) -> DraftStep:
            scored = self._engine.draft_step(tokens, cache, self._stack)
            if scored.prefix is not None:
                prefixes.append(scored.prefix)
            return scored

        unseen = torch.cat([self._unseen, newest]) if self._stack.remembers else newest
        draws = self._draws(unseen, limit, sampler, self._stack.token_ids, step)
        shared = SharedPrefix(torch.cat(prefixes, dim=1), self._stack.shared) if prefixes else None
        return Draft.of(draws, newest.device, token_ids=self._stack.token_ids, shared=shared)

    def observe(self, outcome: RoundResult) -> None:
        # The first rows of the tree were run, and hold verified tokens now as far as the text runs through them.
        seen = sum(row < self._steps for row in outcome.verdict.rows)
        if self._stack.remembers:
            self._unseen = torch.cat([self._unseen[:0] if seen else self._unseen, outcome.seen[seen:]])
        super().observe(outcome)
