"""The part of a search space that the samplers of this package know the meaning of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

BRIDGED, VOCABULARY, STAND_IN = "bridged", "vocabulary", "stand_in"


@dataclass(frozen=True)
class Draft:
    """What a draft leaves out, and what it has instead.

    Args:
        mask: One flag per sublayer, in stack order; true where it is left out.
        bridged: Whether bridges stand in for what is left out.
        vocabulary: Size of the draft vocabulary; 0 is the whole one.
        stand_in: Number of the trained stand-in in place of all sublayers above an exit, which are left out then; 0 is
            none.
    """

    mask: tuple[bool, ...]
    bridged: bool = False
    vocabulary: int = 0
    stand_in: int = 0


@dataclass(frozen=True)
class DraftChoices:
    """What a draft may be, and the names of the parameters that say so.

    Args:
        bits: Name of each sublayer's parameter, in stack order; its choices are 0 and 1, left out.
        bridges: Whether there is a parameter ``bridged`` with the choices False and True. Without it there are no
            bridges.
        vocabularies: Sizes of the draft vocabulary; more than one are the choices of a parameter ``vocabulary``.
        exits: Index of the first sublayer that each trained stand-in stands for, those above it included. With any
            there is a parameter ``stand_in`` with the choices 0, for none, and from 1 on their numbers.
    """

    bits: tuple[str, ...]
    bridges: bool = False
    vocabularies: tuple[int, ...] = (0,)
    exits: tuple[int, ...] = ()

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The parameters, as Optuna describes them."""
        described: dict[str, BaseDistribution] = {name: CategoricalDistribution((0, 1)) for name in self.bits}
        if self.bridges:
            described[BRIDGED] = CategoricalDistribution((False, True))
        if len(self.vocabularies) > 1:
            described[VOCABULARY] = CategoricalDistribution(self.vocabularies)
        if self.exits:
            described[STAND_IN] = CategoricalDistribution(tuple(range(len(self.exits) + 1)))
        return described

    @property
    def extras(self) -> Iterator[tuple[bool, int, int]]:
        """All that may be chosen beside the mask, as (bridged, vocabulary, stand_in)."""
        bridges = (False, True) if self.bridges else (False,)
        return itertools.product(bridges, self.vocabularies, range(len(self.exits) + 1))

    def free(self, stand_in: int) -> int:
        """How many bits matter with this stand-in, from the first one on: those below its exit."""
        return self.exits[stand_in - 1] if stand_in else len(self.bits)

    def effective(self, draft: Draft) -> Draft:
        """The same draft with all left out that its stand-in stands for: two that do the same are equal then."""
        free = self.free(draft.stand_in)
        return replace(draft, mask=draft.mask[:free] + (True,) * (len(draft.mask) - free))

    def parameters(self, draft: Draft) -> dict[str, Any]:
        """A draft as the parameters of a trial."""
        chosen: dict[str, Any] = {name: int(skip) for name, skip in zip(self.bits, draft.mask, strict=True)}
        if self.bridges:
            chosen[BRIDGED] = draft.bridged
        if len(self.vocabularies) > 1:
            chosen[VOCABULARY] = draft.vocabulary
        if self.exits:
            chosen[STAND_IN] = draft.stand_in
        return chosen

    def draft(self, parameters: Mapping[str, Any]) -> Draft | None:
        """What a trial with these parameters tried, in effect; None if it never came to choose all of them.

        Parameters that are no part of the choices are passed over.
        """
        if not all(name in parameters for name in self.distributions):
            return None
        mask = tuple(bool(parameters[name]) for name in self.bits)
        draft = Draft(
            mask,
            parameters[BRIDGED] if self.bridges else False,
            parameters[VOCABULARY] if len(self.vocabularies) > 1 else self.vocabularies[0],
            parameters[STAND_IN] if self.exits else 0,
        )
        return self.effective(draft)
