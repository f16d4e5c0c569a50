"""Drafting with heads on the target model's last hidden state: no pass of the stack, and no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from layerskip.drafting.drafter import BaseDrafter, RoundResult
from layerskip.drafting.heads import DraftHeads, MedusaHeads, check_heads
from layerskip.drafting.stopping import DraftStopping
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import DraftStep, Engine
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sampling import Draft, Draw, Sampler
from layerskip.skip_set import SkipSet
from layerskip.sublayers import DraftLayerStep
from layerskip.token_tree import Branches, numbers_on


class TextState(Protocol):
    """What heads are given of one text. It serves one generation."""

    def add(self, states: Tensor) -> None:
        """The text goes on.

        Args:
            states: ``[m, hidden_size]``, the target model's last hidden states of its next ``m`` tokens, in memory that
                nobody writes to later.
        """

    def state(self) -> Tensor:
        """``[hidden_size]``, what heads read behind the last token."""


class LastState:
    """The target model's last hidden state as it is, as Medusa and Hydra have it.

    Args:
        model: The model, to whose device states are brought.
    """

    def __init__(self, model: LayerSkipModel) -> None:
        self._model = model

    def add(self, states: Tensor) -> None:
        self._last = states[-1].to(self._model.device)

    def state(self) -> Tensor:
        return self._last


class PrefixState:
    """A decoder layer's output behind the last token, which attends to the states of all tokens that were added.

    The layer runs when it is asked, over what came since it last ran: usually once a round, over a token or two. It
    keeps keys and values of its own, of tokens that are certain, so that nothing is ever rolled back. Its positions
    begin at 0 with the first token that was added: rotary embeddings tell distances alone.

    Args:
        model: The model.
        layer: The layer, on the model's device and in its dtype.
    """

    def __init__(self, model: LayerSkipModel, layer: DraftLayerStep) -> None:
        self._model = model
        self._layer = layer
        self._cache = KVCache(num_layers=0, capacity=0)
        self._pending: list[Tensor] = []

    def add(self, states: Tensor) -> None:
        self._pending.append(states.to(self._model.device))

    def state(self) -> Tensor:
        if self._pending:
            states = torch.cat(self._pending)
            self._pending = []
            self._last = through_layer(self._model, self._layer, states, self._cache)[-1]
        return self._last


def through_layer(model: LayerSkipModel, layer: DraftLayerStep, states: Tensor, cache: KVCache) -> Tensor:
    """What a layer behind the target model makes of a text's next hidden states.

    Args:
        model: The model.
        layer: The layer.
        states: ``[m, hidden_size]``, the target model's last ones.
        cache: The layer's keys and values of the tokens before; moves forward by ``m``.

    Returns:
        ``[m, hidden_size]``; each sees those before it and itself.
    """
    out = layer(states[None], model.pass_context(len(states), cache))[0]
    cache.advance(len(states))
    return out


def text_state(model: LayerSkipModel, layer: DraftLayerStep | None) -> TextState:
    """What heads are given of a new text, with a layer or, where there is none, as the target model has it."""
    return LastState(model) if layer is None else PrefixState(model, layer)


class HeadDrafter(BaseDrafter):
    """Drafts with heads, a place for each of them at most.

    A draft may be any tree: to ask a head what follows several tokens takes one pass of it. A confidence exit looks at
    the first token of each place. Heads run as they are on every engine: they are too few operations for a captured
    graph to matter.

    Args:
        model: The model that will verify.
        heads: The heads, on the model's device and in its dtype.
        draft_exit: When to stop proposing; its longest draft uses so many heads, or all where there are fewer.
        token_ids: ``[n]``, the draft vocabulary: the tokens that may be proposed; None for all.
        prefix: A layer that the target model's last hidden states of the whole text go through first, once a round, on
            its device and in its dtype (Hydra++); None gives the heads the last state as it is.
        gate: As in :class:`BaseDrafter`.
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
        draft_exit: DraftStopping,
        *,
        token_ids: Tensor | None = None,
        prefix: DraftLayerStep | None = None,
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
        draft_exit: DraftStopping,
        assets: DraftWeights,
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

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        super().start(engine, prompt, states)
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

    def observe(self, outcome: RoundResult) -> None:
        super().observe(outcome)
        self._text.add(outcome.states)


def _rows(ways: Tensor, numbers: Iterable[int]) -> Tensor:
    return ways.index_select(0, numbers_on(tuple(numbers), ways.device))
