"""Drafting with heads on the target model's last hidden state: no pass of the stack, and no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from layerskip.drafting.config import DraftConfig
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.drafter import BaseDrafter, RoundResult
from layerskip.drafting.heads import MedusaHeads, check_heads
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import DraftStep, Engine
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sampling import Draft, Draw, Sampler
from layerskip.token_tree import numbers_on


class HeadInput:
    """The hidden states of one text that heads read.

    Without a layer, they are the target model's last hidden states, as in Medusa and Hydra. With one (Hydra++), they
    are the layer's output, which attends to the states of all tokens before. The layer runs when a state is asked for,
    over the tokens since it last ran: usually once a round, over a token or two. It keeps keys and values of its own,
    of verified tokens alone, so nothing is ever rolled back. Its positions begin at 0 with the first token that was
    added: rotary embeddings encode distances alone.

    Args:
        model: The model, to whose device states are brought.
        layer: The layer, on the model's device and in its dtype; None without one.
    """

    def __init__(self, model: LayerSkipModel, layer: DraftLayer | None) -> None:
        self._model = model
        self._layer = layer
        self._cache = KVCache(num_layers=0, capacity=0)
        self._pending: list[Tensor] = []

    def add(self, states: Tensor) -> None:
        """Append the states of the text's next tokens.

        Args:
            states: ``[m, hidden_size]``, the target model's last hidden states, in memory that nobody writes to later.
        """
        states = states.to(self._model.device)
        if self._layer is None:
            self._last = states[-1]
        else:
            self._pending.append(states)

    def last(self) -> Tensor:
        """``[hidden_size]``, the state after the last token."""
        if self._layer is not None and self._pending:
            states = torch.cat(self._pending)
            self._pending = []
            self._last = through_layer(self._model, self._layer, states, self._cache)[-1]
        return self._last


def through_layer(model: LayerSkipModel, layer: DraftLayer, states: Tensor, cache: KVCache) -> Tensor:
    """Run the layer before draft heads over a text's next hidden states.

    Args:
        model: The model.
        layer: The layer.
        states: ``[m, hidden_size]``, the target model's last ones.
        cache: The layer's keys and values of the tokens before; moves forward by ``m``.

    Returns:
        ``[m, hidden_size]``; each position attends to those before it and itself.
    """
    out: Tensor = layer(states[None], model.pass_context(len(states), cache))[0]
    cache.advance(len(states))
    return out


class HeadDrafter(BaseDrafter):
    """Drafts with heads, a place for each of them at most.

    A draft may be any tree: a head scores what follows several tokens in one pass. A confidence threshold looks at the
    first token of each place. Heads run eagerly on every engine: they are too few operations for a captured graph to
    matter.

    Args:
        model: The model that will verify.
        config: How to draft, with a skip set that skips nothing. The longest draft of its stopping rule uses so many
            heads, or all where there are fewer.
        weights: The heads, the layer before them if there is one, and the draft vocabulary.

    Raises:
        InvalidInputError: There are no heads, or they or their layer are for another model.
    """

    def __init__(self, model: LayerSkipModel, config: DraftConfig, weights: DraftWeights) -> None:
        super().__init__(model, config)
        weights = weights.placed_on(model)
        if weights.heads is None:
            raise InvalidInputError("draft heads: the draft's weights have none")
        check_heads(weights.heads, model)
        self._heads = weights.heads
        layer = self._prefix_layer = weights.prefix_layer
        if layer is not None and layer.start != len(model.sublayers):
            raise InvalidInputError(
                f"draft heads: the layer before them runs after {layer.start} sublayers, but the model has "
                f"{len(model.sublayers)}; train heads for this model with 'layerskip tune'"
            )
        self._stack = model.head_of(weights.token_ids, config.precision)

    def start(self, engine: Engine, prompt: Tensor, states: Tensor) -> None:
        super().start(engine, prompt, states)
        self._input = HeadInput(self._model, self._prefix_layer)  # new, so that copies of a drafter share nothing
        self._input.add(states)

    def propose(self, newest: Tensor, cache: KVCache, limit: int, sampler: Sampler) -> Draft:
        most = 0 if self._paused else min(limit, self._heads.count, self._stop.max_length)
        if not most:
            return Draft.of([], newest.device)
        score, token_ids = self._scorer(most), self._stack.token_ids
        paths = newest[None]  # [p, place + 1], to each token of the last place the tokens from the newest one on
        draws: list[Draw] = []
        grown: list[list[int]] = []
        while len(grown) < most:
            place = len(grown)
            widths = zip(range(len(paths)), self._widths_at(place), strict=False)
            inner = {path: width for path, width in widths if width}
            steps = [DraftStep.of(scores, token_ids, None) for scores in score(place, _rows(paths, inner))]
            here = {
                path: sampler.draft(step, token_ids, width, path=paths[path, 1:])
                for step, (path, width) in zip(steps, inner.items(), strict=True)
            }
            draws += here.values()
            grown.append([len(here[path].tokens) if path in here else 0 for path in range(len(paths))])
            before = _rows(paths, [path for path, count in enumerate(grown[-1]) for _ in range(count)])
            paths = torch.cat([before, torch.cat([draw.tokens for draw in here.values()])[:, None]], dim=1)
            if self._stop.reads_confidence and self._stop.stops_after(float(steps[0].confidence)):
                break
        self._steps = len(grown)
        return Draft.grown(draws, grown, newest.device, token_ids=token_ids)

    def _scorer(self, most: int) -> Callable[[int, Tensor], Tensor]:
        """Scores the draft vocabulary for a place, ``[p, n]``, after each of ``p`` paths there.

        Args:
            most: Places that may be asked for, at least 1.
        """
        heads, state = self._heads, self._input.last()
        if isinstance(heads, MedusaHeads):  # no head looks at tokens
            logits = self._logits(heads.all_at(state)[:most])
            return lambda place, paths: logits[place].expand(len(paths), -1)

        def score(place: int, paths: Tensor) -> Tensor:
            known = self._model.embed(paths.flatten())[0].unflatten(0, paths.shape)
            return self._logits(heads.at(place, state.expand(len(paths), -1), known))

        return score

    def _logits(self, states: Tensor) -> Tensor:
        return self._model.logits(states[None], self._stack)

    def observe(self, outcome: RoundResult) -> None:
        super().observe(outcome)
        self._input.add(outcome.states)


def _rows(paths: Tensor, numbers: Iterable[int]) -> Tensor:
    return paths.index_select(0, numbers_on(tuple(numbers), paths.device))
