"""The draft of highest predicted speedup, given what leaving out each sublayer does and saves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from search.samplers.choices import Draft, DraftChoices
from search.samplers.damage import Damage, acceptance_of
from search.samplers.speedup import DraftCosts, Floats, SpeedupFormula


@dataclass(frozen=True)
class Proposal:
    """A draft and what is predicted for it."""

    draft: Draft
    speedup: float


class DraftMaximizer:
    """Finds the draft of highest predicted speedup.

    Sublayers are left out in the order of damage ÷ cost, as many as pay: the fractional knapsack, whose optimum lies
    at a breakpoint. Flips of single sublayers then mend what this leaves, for the speedup is not linear and bridges
    stand for runs.

    Args:
        choices: What a draft may be.
        costs: What passes cost.
        max_draft_length: Longest draft.
    """

    def __init__(self, choices: DraftChoices, costs: DraftCosts, max_draft_length: int) -> None:
        self._choices = choices
        self._costs = costs
        self._formula = SpeedupFormula.of(costs, max_draft_length)
        self._saved = _saved_by_each(len(choices.bits), costs, choices.vocabularies[0])

    def best(self, damage: Damage) -> Proposal:
        """The best draft if the damage is this."""
        starts = [self._best_prefix(damage, *extras) for extras in self._choices.extras]
        best = max(starts, key=lambda proposal: proposal.speedup)
        while (flipped := self._best_of(damage, list(_flips(best.draft)))).speedup > best.speedup:
            best = flipped
        return best

    def by_indifference(self, damage: Damage, draft: Draft) -> list[int]:
        """Sublayers by how little it matters whether a draft leaves them out: next to break-even first."""
        ratio = self._ratio(damage, draft.bridged)
        order = np.argsort(ratio, kind="stable")
        skipped = sum(draft.mask)
        break_even = float(ratio[order[max(skipped - 1, 0) : skipped + 1]].mean())
        order_of_closeness: list[int] = np.argsort(np.abs(ratio - break_even), kind="stable").tolist()
        return order_of_closeness

    def _best_prefix(self, damage: Damage, bridged: bool, vocabulary: int) -> Proposal:
        # Of several that do no damage at all, the dearest first.
        order = np.lexsort((-self._saved, self._ratio(damage, bridged)))
        mask = np.zeros(len(order), dtype=bool)
        prefixes = [Draft(tuple(mask.tolist()), bridged, vocabulary)]
        for index in order[:-1]:
            mask[index] = True
            prefixes.append(Draft(tuple(mask.tolist()), bridged, vocabulary))
        return self._best_of(damage, prefixes)

    def _ratio(self, damage: Damage, bridged: bool) -> Floats:
        ratio: Floats = damage.of_sublayers(bridged) / self._saved
        return ratio

    def _best_of(self, damage: Damage, drafts: Sequence[Draft]) -> Proposal:
        """The best of drafts that differ in their masks alone."""
        bridged, vocabulary = drafts[0].bridged, drafts[0].vocabulary
        masks = np.array([draft.mask for draft in drafts], dtype=float)  # [drafts, sublayers]
        total = masks @ damage.of_sublayers(bridged) + damage.of_extras(bridged, vocabulary)
        step_costs = [self._costs.draft_step_cost(draft.mask, bridged, vocabulary) for draft in drafts]
        speedups = self._formula(acceptance_of(total), np.array(step_costs))
        best = int(speedups.argmax())
        return Proposal(drafts[best], float(speedups[best]))


def _flips(draft: Draft) -> Iterator[Draft]:
    """Drafts that leave out one sublayer more or less."""
    for index in range(len(draft.mask)):
        flipped = with_flips(draft, (index,))
        if not all(flipped.mask):  # a draft must keep something
            yield flipped


def with_flips(draft: Draft, indices: Sequence[int]) -> Draft:
    """The draft that leaves out these sublayers where it kept them, and keeps them where it left them out."""
    return replace(draft, mask=tuple(skip != (index in indices) for index, skip in enumerate(draft.mask)))


def _saved_by_each(sublayers: int, costs: DraftCosts, vocabulary: int) -> Floats:
    """What leaving out each sublayer alone saves of a draft step; above 0, also where a measurement says otherwise."""
    nothing = [False] * sublayers
    everything = costs.draft_step_cost(nothing, False, vocabulary)
    saved = []
    for index in range(sublayers):
        alone = [other == index for other in range(sublayers)]
        saved.append(everything - costs.draft_step_cost(alone, False, vocabulary))
    return np.maximum(saved, 1e-6)


def nearby(draft: Draft, order: Sequence[int]) -> Iterator[Draft]:
    """A draft, then those that differ from it by one flip, by two, and so on; earlier indices of ``order`` first."""
    for count in range(len(order) + 1):
        for indices in itertools.combinations(order, count):
            flipped = with_flips(draft, indices)
            if not all(flipped.mask):  # a draft must keep something
                yield flipped
