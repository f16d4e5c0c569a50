"""Draft heads: small networks that foretell tokens further on from the target model's last hidden state.

Nothing of the stack runs to draft. The head of the first place scores the token behind the newest one, that of the
second place the token after it, and so on. All of them end in the model's own final norm and head, which they share.

The hidden state is that behind the last sublayer, at the position from which the newest token was chosen, scaled to a
root mean square of 1. The papers' heads see it behind the final norm instead, and score without a norm. Here the norm
comes last, as in every other draft, so that a head that has learned nothing gives the target model's own scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from layerskip.errors import InvalidInputError

if TYPE_CHECKING:
    from layerskip.model import LayerSkipModel

HeadKind = Literal["medusa", "hydra"]
HEAD_KINDS: tuple[HeadKind, ...] = ("medusa", "hydra")
_EPSILON = 1e-12  # for vectors of nothing but 0


@dataclass(frozen=True, eq=False)
class MedusaHeads:
    """Medusa's first kind of heads: for each place one residual block, ``x + SiLU(W x + b)``.

    No head looks at tokens, so all of them can be asked at once. The block's width is the model's, as in the paper.

    Source: Cai et al., "Medusa", ICML 2024 (arXiv 2401.10774), section 2.1.1; there each head has a copy of the model's
    head, which is trained too.

    Args:
        weight: ``W`` by place, ``[heads, hidden_size, hidden_size]``.
        bias: ``b`` by place, ``[heads, hidden_size]``.

    Raises:
        InvalidInputError: The tensors' shapes do not fit together.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    kind: ClassVar[HeadKind] = "medusa"
    at_once: ClassVar[bool] = True  # all places are foretold together

    def __post_init__(self) -> None:
        if self.weight.dim() != 3 or not len(self.weight):
            raise InvalidInputError(
                f"medusa.weight: expected [heads, hidden_size, hidden_size], found {list(self.weight.shape)}"
            )
        heads, size, _ = self.weight.shape
        _check("medusa.weight", self.weight, heads, size, size)
        _check("medusa.bias", self.bias, heads, size)

    @classmethod
    def untrained(cls, heads: int, hidden_size: int) -> MedusaHeads:
        """Heads that all give the target model's own scores: every weight is 0."""
        return cls(torch.zeros(heads, hidden_size, hidden_size), torch.zeros(heads, hidden_size))

    @property
    def count(self) -> int:
        """How many places they foretell."""
        return len(self.weight)

    @property
    def hidden_size(self) -> int:
        """The size of the hidden states that they are for."""
        return self.weight.shape[-1]

    def at(self, place: int, states: Tensor, known: Tensor) -> Tensor:
        """One head over many positions.

        Args:
            place: Which head, from 0.
            states: ``[p, hidden_size]``, the target model's last hidden states.
            known: ``[p, place + 1, hidden_size]``, the embeddings of the tokens behind each of them that come before
                what is foretold. Not looked at.

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

    def to(self, like: Tensor) -> MedusaHeads:
        """The heads in the dtype and on the device of a tensor."""
        return MedusaHeads(self.weight.to(like.device, like.dtype), self.bias.to(like.device, like.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``medusa.weight`` and ``medusa.bias``."""
        return {"medusa.weight": self.weight, "medusa.bias": self.bias}


@dataclass(frozen=True, eq=False)
class HydraHead:
    """``x + D SiLU(U [x; e1; …] + b)``, where ``e1`` and so on are the embeddings of the tokens known so far.

    Args:
        up: ``U``, ``[width, (1 + tokens) * hidden_size]``.
        bias: ``b``, ``[width]``.
        down: ``D``, ``[hidden_size, width]``.
    """

    up: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    down: Tensor = field(repr=False)

    def __call__(self, states: Tensor, known: Tensor) -> Tensor:
        """Hidden states to be scored, ``[p, hidden_size]``; ``known`` is ``[p, tokens, hidden_size]``."""
        x = _unit(states)
        seen = torch.cat([x, _unit(known).flatten(1)], dim=1)
        return x + functional.linear(functional.silu(functional.linear(seen, self.up, self.bias)), self.down)


@dataclass(frozen=True, eq=False)
class HydraHeads:
    """Hydra's heads: each sees the tokens chosen before its place too, by a perceptron with one hidden layer.

    They are asked one after the other. Embeddings are scaled like the hidden state, to a root mean square of 1. The
    hidden layer is as wide as the model's hidden states.

    Source: Ankner et al., "Hydra", COLM 2024 (arXiv 2402.05109), section 3. Hydra++'s attention over the text before
    (section 4) is not part of them: it makes the states that they are given, see
    :class:`layerskip.drafting.head_drafter.PrefixState`.

    Args:
        heads: By place; the first sees one token, the newest.

    Raises:
        InvalidInputError: The tensors' shapes do not fit together.
    """

    heads: Sequence[HydraHead]
    kind: ClassVar[HeadKind] = "hydra"
    at_once: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.heads or self.heads[0].down.dim() != 2:
            raise InvalidInputError("hydra.1.down: expected [hidden_size, width]")
        size = self.hidden_size
        for number, head in enumerate(self.heads, start=1):
            width = len(head.up)
            _check(f"hydra.{number}.up", head.up, width, (1 + number) * size)
            _check(f"hydra.{number}.bias", head.bias, width)
            _check(f"hydra.{number}.down", head.down, size, width)

    @classmethod
    def untrained(cls, heads: int, hidden_size: int, *, seed: int = 0) -> HydraHeads:
        """Heads that all give the target model's own scores: ``D`` is 0, and ``U`` is random, by a seed."""
        chance = torch.Generator().manual_seed(seed)

        def head(number: int) -> HydraHead:
            inputs = (1 + number) * hidden_size
            up = torch.randn(hidden_size, inputs, generator=chance) / inputs**0.5
            return HydraHead(up, torch.zeros(hidden_size), torch.zeros(hidden_size, hidden_size))

        return cls([head(number) for number in range(1, heads + 1)])

    @property
    def count(self) -> int:
        """How many places they foretell."""
        return len(self.heads)

    @property
    def hidden_size(self) -> int:
        """The size of the hidden states that they are for."""
        return len(self.heads[0].down)

    def at(self, place: int, states: Tensor, known: Tensor) -> Tensor:
        """As :meth:`MedusaHeads.at`, but what is known matters."""
        return self.heads[place](states, known)

    def weights_read(self, places: int, scoring: int) -> int:
        """As :meth:`MedusaHeads.weights_read`, but each place is scored by itself."""
        own = sum(part.numel() for head in self.heads[:places] for part in (head.up, head.bias, head.down))
        return own + places * scoring

    def to(self, like: Tensor) -> HydraHeads:
        """The heads in the dtype and on the device of a tensor."""

        def moved(head: HydraHead) -> HydraHead:
            return HydraHead(*(part.to(like.device, like.dtype) for part in (head.up, head.bias, head.down)))

        return HydraHeads([moved(head) for head in self.heads])

    def tensors(self) -> dict[str, Tensor]:
        """``hydra.N.up``, ``hydra.N.bias`` and ``hydra.N.down``, where ``N`` is the place, from 1."""
        return {
            f"hydra.{number}.{part}": getattr(head, part)
            for number, head in enumerate(self.heads, start=1)
            for part in _HYDRA_PARTS
        }


DraftHeads = MedusaHeads | HydraHeads
_HYDRA_PARTS = ("up", "bias", "down")


def untrained_heads(kind: HeadKind, heads: int, hidden_size: int, *, seed: int = 0) -> DraftHeads:
    """Heads to train, which all give the target model's own scores at first.

    Args:
        kind: ``medusa`` or ``hydra``.
        heads: How many places they shall foretell, at least 1.
        hidden_size: The model's.
        seed: Of what is random in them.
    """
    if kind == "medusa":
        return MedusaHeads.untrained(heads, hidden_size)
    return HydraHeads.untrained(heads, hidden_size, seed=seed)


def heads_of(tensors: Mapping[str, Tensor]) -> DraftHeads | None:
    """The heads whose tensors are among these, by the names that ``tensors()`` gives them; None if there are none.

    The heads compute with these very tensors.

    Raises:
        KeyError: One of several is missing.
        InvalidInputError: Their shapes do not fit together, or there are heads of both kinds.
    """
    kinds = {name.partition(".")[0] for name in tensors} & set(HEAD_KINDS)
    if len(kinds) > 1:
        raise InvalidInputError("draft heads: there are medusa and hydra heads; expected one kind")
    if kinds == {"medusa"}:
        return MedusaHeads(tensors["medusa.weight"], tensors["medusa.bias"])
    if kinds == {"hydra"}:
        count = len({name.split(".")[1] for name in tensors if name.startswith("hydra.")})
        return HydraHeads(
            [HydraHead(*(tensors[f"hydra.{number}.{part}"] for part in _HYDRA_PARTS)) for number in range(1, count + 1)]
        )
    return None


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


def _check(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise InvalidInputError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")


def _unit(x: Tensor) -> Tensor:
    """Vectors ``[..., hidden_size]`` scaled to a root mean square of 1, in their dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)).to(x.dtype)
