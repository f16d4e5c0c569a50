"""Draft heads: small networks that predict the tokens after the next one from the target model's last hidden state.

Nothing of the stack runs to draft. The head of the first place scores the token after the newest one, that of the
second place the token after it, and so on. All of them end in the model's own final norm and head, which they share.

The hidden state is the one after the last sublayer, at the position from which the newest token was chosen, scaled to a
root mean square of 1. The papers' heads see it after the final norm instead, and score without a norm. Here the norm
comes last, as in every other draft, so that a head that has learned nothing gives the target model's own scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel

HeadKind = Literal["medusa", "hydra"]
HEAD_KINDS: tuple[HeadKind, ...] = ("medusa", "hydra")
_EPSILON = 1e-12  # for vectors of nothing but 0


class MedusaHeads(nn.Module):
    """Medusa's first kind of heads: for each place one residual block, ``x + SiLU(W x + b)``.

    No head looks at tokens, so all of them run at once. The block's width is the model's, as in the paper. New heads
    all give the target model's own scores: every weight is 0.

    Source: Cai et al., "Medusa", ICML 2024 (arXiv 2401.10774), section 2.1.1; there each head has a copy of the model's
    head, which is trained too.

    Args:
        heads: How many places they predict.
        hidden_size: The model's.

    Attributes:
        weight: ``W`` by place, ``[heads, hidden_size, hidden_size]``.
        bias: ``b`` by place, ``[heads, hidden_size]``.
    """

    kind: ClassVar[HeadKind] = "medusa"
    at_once: ClassVar[bool] = True  # all places are predicted together

    def __init__(self, heads: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = _zeros(heads, hidden_size, hidden_size)
        self.bias = _zeros(heads, hidden_size)

    @property
    def count(self) -> int:
        """How many places they predict."""
        return len(self.weight)

    @property
    def hidden_size(self) -> int:
        """The size of the hidden states that they are for."""
        return self.weight.shape[-1]

    def at(self, place: int, states: Tensor, known: Tensor) -> Tensor:
        """Run one head over many positions.

        Args:
            place: Which head, from 0.
            states: ``[p, hidden_size]``, the target model's last hidden states.
            known: ``[p, place + 1, hidden_size]``, the embeddings of the tokens between each of them and the predicted
                one. Unused.

        Returns:
            ``[p, hidden_size]``, hidden states to be scored.
        """
        x = _unit(states)
        return x + functional.silu(functional.linear(x, self.weight[place], self.bias[place]))

    def all_at(self, state: Tensor) -> Tensor:
        """All heads at one position, ``[hidden_size]``: ``[heads, hidden_size]``, hidden states to be scored."""
        x = _unit(state)
        return x + functional.silu(self.weight @ x + self.bias)

    def weights_read(self, places: int, scoring: int) -> int:
        """How many weights a draft of so many places reads, where scoring reads ``scoring``, once for all of them."""
        return places * (self.weight[0].numel() + self.bias[0].numel()) + scoring


class HydraHead(nn.Module):
    """``x + D SiLU(U [x; e1; …] + b)``, where ``e1`` and so on are the embeddings of the tokens known so far.

    Args:
        tokens: How many tokens are known.
        hidden_size: The model's.

    Attributes:
        up: ``U``, ``[hidden_size, (1 + tokens) * hidden_size]``.
        bias: ``b``, ``[hidden_size]``.
        down: ``D``, ``[hidden_size, hidden_size]``.
    """

    def __init__(self, tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.up = _zeros(hidden_size, (1 + tokens) * hidden_size)
        self.bias = _zeros(hidden_size)
        self.down = _zeros(hidden_size, hidden_size)

    def forward(self, states: Tensor, known: Tensor) -> Tensor:
        """Hidden states to be scored, ``[p, hidden_size]``; ``known`` is ``[p, tokens, hidden_size]``."""
        x = _unit(states)
        seen = torch.cat([x, _unit(known).flatten(1)], dim=1)
        return x + functional.linear(functional.silu(functional.linear(seen, self.up, self.bias)), self.down)


class HydraHeads(nn.ModuleDict):
    """Hydra's heads: each sees the tokens chosen before its place too, by a perceptron with one hidden layer.

    They run one after the other. Embeddings are scaled like the hidden state, to a root mean square of 1. The hidden
    layer is as wide as the model's hidden states. Heads are keyed by their place, from ``"1"`` on.

    Source: Ankner et al., "Hydra", COLM 2024 (arXiv 2402.05109), section 3. Hydra++'s attention over the text before
    (section 4) is not part of them: it makes the states that they read, see
    :class:`layerskip.drafting.head_drafter.HeadInput`.

    Args:
        heads: How many places they predict.
        hidden_size: The model's.
    """

    kind: ClassVar[HeadKind] = "hydra"
    at_once: ClassVar[bool] = False

    def __init__(self, heads: int, hidden_size: int) -> None:
        super().__init__({str(number): HydraHead(number, hidden_size) for number in range(1, heads + 1)})
        self.hidden_size = hidden_size

    @property
    def count(self) -> int:
        """How many places they predict."""
        return len(self)

    def head(self, place: int) -> HydraHead:
        """The head of a place, from 0."""
        return cast("HydraHead", self[str(place + 1)])

    def at(self, place: int, states: Tensor, known: Tensor) -> Tensor:
        """As :meth:`MedusaHeads.at`, but what is known matters."""
        out: Tensor = self.head(place)(states, known)
        return out

    def weights_read(self, places: int, scoring: int) -> int:
        """As :meth:`MedusaHeads.weights_read`, but each place is scored by itself."""
        own = sum(weight.numel() for place in range(places) for weight in self.head(place).parameters())
        return own + places * scoring


DraftHeads = MedusaHeads | HydraHeads
_CLASSES: Mapping[HeadKind, type[DraftHeads]] = {"medusa": MedusaHeads, "hydra": HydraHeads}


def empty_heads(kind: HeadKind, heads: int, hidden_size: int) -> DraftHeads:
    """Heads without memory for weights, to load some into."""
    with torch.device("meta"):
        return _CLASSES[kind](heads, hidden_size)


def untrained_heads(kind: HeadKind, heads: int, hidden_size: int, *, seed: int = 0) -> DraftHeads:
    """Heads to train, which all give the target model's own scores at first: what they add is 0.

    Args:
        kind: ``medusa`` or ``hydra``.
        heads: How many places they predict, at least 1.
        hidden_size: The model's.
        seed: Of the random weights in them: Hydra's ``U``.
    """
    untrained = _CLASSES[kind](heads, hidden_size)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(untrained, HydraHeads):
        for place in range(heads):
            up = untrained.head(place).up
            up.copy_(torch.randn(up.shape, generator=generator) / up.shape[1] ** 0.5)
    return untrained


def check_heads(heads: DraftHeads, model: LayerSkipModel) -> None:
    """Make sure that heads are for this model.

    Raises:
        InvalidInputError: They are for hidden states of another size.
    """
    if heads.hidden_size != model.config.hidden_size:
        raise InvalidInputError(
            f"draft heads: are for hidden states of {heads.hidden_size} numbers, but this model's have "
            f"{model.config.hidden_size}; train heads for this model with 'layerskip tune'"
        )


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=False)


def _unit(x: Tensor) -> Tensor:
    """Vectors ``[..., hidden_size]`` scaled to a root mean square of 1, in their dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)).to(x.dtype)
