"""What draft heads read of the full model: its last hidden state, as it is or through a layer over the whole text.

Source of the layer: "prefix attention" in Hydra++ (Ankner et al., COLM 2024, arXiv 2402.05109, section 4).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from layerskip.stack.kv_cache import KVCache
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.sublayers import LayerStandIn


class TextState(Protocol):
    """What heads are given of one text. It serves one generation."""

    def add(self, states: Tensor) -> None:
        """The text goes on.

        Args:
            states: ``[m, hidden_size]``, the full model's last hidden states of its next ``m`` tokens, in memory that
                nobody writes to later.
        """

    def state(self) -> Tensor:
        """``[hidden_size]``, what heads read behind the last token."""


class LastState:
    """The full model's last hidden state as it is, as Medusa and Hydra have it.

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

    def __init__(self, model: LayerSkipModel, layer: LayerStandIn) -> None:
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


def through_layer(model: LayerSkipModel, layer: LayerStandIn, states: Tensor, cache: KVCache) -> Tensor:
    """What a layer behind the full model makes of a text's next hidden states.

    Args:
        model: The model.
        layer: The layer.
        states: ``[m, hidden_size]``, the full model's last ones.
        cache: The layer's keys and values of the tokens before; moves forward by ``m``.

    Returns:
        ``[m, hidden_size]``; each sees those before it and itself.
    """
    out = layer(states[None], model.pass_context(len(states), cache))[0]
    cache.advance(len(states))
    return out


def text_state(model: LayerSkipModel, layer: LayerStandIn | None) -> TextState:
    """What heads are given of a new text, with a layer or, where there is none, as the full model has it."""
    return LastState(model) if layer is None else PrefixState(model, layer)
