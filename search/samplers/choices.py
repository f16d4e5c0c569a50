"""The part of a search space that the samplers of this package know the meaning of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

BRIDGED, VOCABULARY = "bridged", "vocabulary"


@dataclass(frozen=True)
class Draft:
    """What a draft leaves out, and what it has instead.

    Args:
        mask: One flag per sublayer, in stack order; true where it is left out.
        bridged: Whether bridges stand in for what is left out.
        vocabulary: Size of the draft vocabulary; 0 is the whole one.
    """

    mask: tuple[bool, ...]
    bridged: bool = False
    vocabulary: int = 0


@dataclass(frozen=True)
class DraftChoices:
    """What a draft may be, and the names of the parameters that say so.

    Args:
        bits: Name of each sublayer's parameter, in stack order; its choices are 0 and 1, left out.
        bridges: Whether there is a parameter ``bridged`` with the choices False and True. Without it there are no
            bridges.
        vocabularies: Sizes of the draft vocabulary; more than one are the choices of a parameter ``vocabulary``.
    """

    bits: tuple[str, ...]
    bridges: bool = False
    vocabularies: tuple[int, ...] = (0,)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The parameters, as Optuna describes them."""
        described: dict[str, BaseDistribution] = {name: CategoricalDistribution((0, 1)) for name in self.bits}
        if self.bridges:
            described[BRIDGED] = CategoricalDistribution((False, True))
        if len(self.vocabularies) > 1:
            described[VOCABULARY] = CategoricalDistribution(self.vocabularies)
        return described

    @property
    def extras(self) -> Iterator[tuple[bool, int]]:
        """All that may be chosen beside the mask, as (bridged, vocabulary)."""
        return itertools.product((False, True) if self.bridges else (False,), self.vocabularies)

    def parameters(self, draft: Draft) -> dict[str, Any]:
        """A draft as the parameters of a trial."""
        chosen: dict[str, Any] = {name: int(skip) for name, skip in zip(self.bits, draft.mask, strict=True)}
        if self.bridges:
            chosen[BRIDGED] = draft.bridged
        if len(self.vocabularies) > 1:
            chosen[VOCABULARY] = draft.vocabulary
        return chosen

    def draft(self, parameters: Mapping[str, Any]) -> Draft | None:
        """What a trial with these parameters tried; None if it never came to choose all of them.

        Parameters that are no part of the choices are passed over.
        """
        if not all(name in parameters for name in self.distributions):
            return None
        mask = tuple(bool(parameters[name]) for name in self.bits)
        return Draft(
            mask,
            parameters[BRIDGED] if self.bridges else False,
            parameters[VOCABULARY] if len(self.vocabularies) > 1 else self.vocabularies[0],
        )
