"""Drafting with heads on the full model's last hidden state: no pass of the stack, and no cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip.decoding.draft_exit import DraftExit
from layerskip.decoding.drafting import Outcome, PacedDrafter
from layerskip.decoding.prefix import text_state
from layerskip.decoding.sampling import Draft, Sampler
from layerskip.drafts.assets import DraftAssets
from layerskip.drafts.heads import DraftHeads, check_heads
from layerskip.engine import DraftStep
from layerskip.errors import InvalidInputError
from layerskip.stack.kv_cache import KVCache
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from layerskip.stack.sublayers import LayerStandIn


class HeadDrafter(PacedDrafter):
    """Drafts with heads, a place for each of them at most.

    A draft is a chain with leaves, as that of :class:`layerskip.SkipDrafter`. Heads run as they are on every engine:
    they are too few operations for a captured graph to matter.

    Args:
        model: The model that will verify.
        heads: The heads, on the model's device and in its dtype.
        draft_exit: When to stop proposing; its longest draft uses so many heads, or all where there are fewer.
        token_ids: ``[n]``, the draft vocabulary: the tokens that may be proposed; None for all.
        prefix: A layer that the full model's last hidden states of the whole text go through first, once a round, on
            its device and in its dtype (Hydra++); None gives the heads the last state as it is.
        gate: As in :class:`PacedDrafter`.
        branches: Likewise.

    Raises:
        InvalidInputError: The heads are for another size of hidden states, the gate is not from 0 to 1, or the branches
            are not from 1 on or too many.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        heads: DraftHeads,
        draft_exit: DraftExit,
        *,
        token_ids: Tensor | None = None,
        prefix: LayerStandIn | None = None,
        gate: float = 0.0,
        branches: Sequence[int] = (),
    ) -> None:
        super().__init__(draft_exit, gate=gate, branches=branches)
        check_heads(heads, model)
        self._model = model
        self._heads = heads
        self._prefix = prefix
        # Of the stack only its head is used, which scores the draft vocabulary.
        self._stack = model.stack_of(SkipSet(model.num_layers), token_ids=token_ids)

    @classmethod
    def of(
        cls,
        model: LayerSkipModel,
        draft_exit: DraftExit,
        assets: DraftAssets,
        *,
        gate: float = 0.0,
        branches: Sequence[int] = (),
    ) -> HeadDrafter:
        """The drafter with these heads, their layer and this draft vocabulary, brought to where the model is.

        Raises:
            InvalidInputError: There are no heads, their layer is not for this model, or as in the class.
        """
        here = assets.to(torch.empty(0, dtype=model.dtype, device=model.device))
        if here.heads is None:
            raise InvalidInputError("draft heads: there are none among the draft's tensors")
        return cls(
            model,
            here.heads,
            draft_exit,
            token_ids=here.token_ids,
            prefix=here.prefix(model),
            gate=gate,
            branches=branches,
        )

    def start(self, prompt: Tensor, states: Tensor) -> None:
        super().start(prompt, states)
        self._text = text_state(self._model, self._prefix)  # anew, so that copies of a drafter share nothing
        self._text.add(states)

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        known: list[Tensor] = []  # embeddings, [1, hidden_size]
        ready: list[Tensor] = []  # scores of the next places, [n]

        def step(token: Tensor) -> DraftStep:
            known.append(self._model.embed(token)[0])
            if not ready:
                ahead = self._heads.ahead(self._text.state(), torch.cat(known))[: most - len(known) + 1]
                ready.extend(self._model.logits(ahead[None], self._stack))
            return DraftStep.of(ready.pop(0), self._stack.token_ids, None)

        most = min(limit, self._heads.count, self._exit.max_length)
        draws = self._draws(newest, most, sampler, self._stack.token_ids, step)
        return Draft.of(draws, newest.device, token_ids=self._stack.token_ids)

    def observe(self, outcome: Outcome) -> None:
        super().observe(outcome)
        self._text.add(outcome.states)
