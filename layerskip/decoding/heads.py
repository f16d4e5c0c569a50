"""Drafting with heads on the full model's last hidden state: no pass of the stack, and no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from layerskip.decoding.draft_exit import DraftExit
from layerskip.decoding.drafting import Outcome, PacedDrafter
from layerskip.decoding.prefix import text_state
from layerskip.decoding.sampling import Draft, Draw, Sampler
from layerskip.drafts.assets import DraftAssets
from layerskip.drafts.heads import DraftHeads, MedusaHeads, check_heads
from layerskip.engine import DraftStep
from layerskip.errors import InvalidInputError
from layerskip.stack.kv_cache import KVCache
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from layerskip.stack.sublayers import LayerStandIn
from layerskip.stack.tree import Branches, numbers_on


class HeadDrafter(PacedDrafter):
    """Drafts with heads, a place for each of them at most.

    A draft may be any tree: to ask a head what follows several tokens takes one pass of it. A confidence exit looks at
    the first token of each place. Heads run as they are on every engine: they are too few operations for a captured
    graph to matter.

    Args:
        model: The model that will verify.
        heads: The heads, on the model's device and in its dtype.
        draft_exit: When to stop proposing; its longest draft uses so many heads, or all where there are fewer.
        token_ids: ``[n]``, the draft vocabulary: the tokens that may be proposed; None for all.
        prefix: A layer that the full model's last hidden states of the whole text go through first, once a round, on
            its device and in its dtype (Hydra++); None gives the heads the last state as it is.
        gate: As in :class:`PacedDrafter`.
        branches: How many tokens to propose for the first place of a draft, for the second, and so on; for later ones,
            one. A number counts those behind the first token of the place before; a list of numbers those behind each
            of its tokens.

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
        branches: Branches = (),
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
        branches: Branches = (),
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
        most = 0 if self._unsure else min(limit, self._heads.count, self._exit.max_length)
        if not most:
            return Draft.of([], newest.device)
        score, token_ids = self._scorer(most), self._stack.token_ids
        ways = newest[None]  # [p, place + 1], to each token of the last place the tokens from the newest one on
        draws: list[Draw] = []
        grown: list[list[int]] = []
        while len(grown) < most:
            place = len(grown)
            inner = {way: width for way, width in zip(range(len(ways)), self._widths_at(place), strict=False) if width}
            steps = [DraftStep.of(scores, token_ids, None) for scores in score(place, _rows(ways, inner))]
            here = {
                way: sampler.draft(step, token_ids, width, behind=ways[way, 1:])
                for step, (way, width) in zip(steps, inner.items(), strict=True)
            }
            draws += here.values()
            grown.append([len(here[way].tokens) if way in here else 0 for way in range(len(ways))])
            before = _rows(ways, [way for way, count in enumerate(grown[-1]) for _ in range(count)])
            ways = torch.cat([before, torch.cat([draw.tokens for draw in here.values()])[:, None]], dim=1)
            if self._exit.reads_confidence and self._exit.stops_after(float(steps[0].confidence)):
                break
        self._steps = len(grown)
        return Draft.grown(draws, grown, newest.device, token_ids=token_ids)

    def _scorer(self, most: int) -> Callable[[int, Tensor], Tensor]:
        """What scores the draft vocabulary for a place, ``[p, n]``, behind ``p`` ways there.

        Args:
            most: Places that may be asked for, at least 1.
        """
        heads, state = self._heads, self._text.state()
        if isinstance(heads, MedusaHeads):  # no head looks at tokens
            said = self._logits(heads.all_at(state)[:most])
            return lambda place, ways: said[place].expand(len(ways), -1)

        def score(place: int, ways: Tensor) -> Tensor:
            known = self._model.embed(ways.flatten())[0].unflatten(0, ways.shape)
            return self._logits(heads.at(place, state.expand(len(ways), -1), known))

        return score

    def _logits(self, states: Tensor) -> Tensor:
        return self._model.logits(states[None], self._stack)

    def observe(self, outcome: Outcome) -> None:
        super().observe(outcome)
        self._text.add(outcome.states)


def _rows(ways: Tensor, numbers: Iterable[int]) -> Tensor:
    return ways.index_select(0, numbers_on(tuple(numbers), ways.device))
