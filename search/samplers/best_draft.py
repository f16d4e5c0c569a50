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
        self._saved = _saved_by_each(choices, costs)

    def best(self, damage: Damage) -> Proposal:
        """The best draft if the damage is this."""
        starts = [self._best_prefix(damage, *extras) for extras in self._choices.extras]
        best = max(starts, key=lambda proposal: proposal.speedup)
        while drafts := list(self._flips(best.draft)):
            flipped = self._best_of(damage, drafts)
            if flipped.speedup <= best.speedup:
                break
            best = flipped
        return best

    def by_indifference(self, damage: Damage, draft: Draft) -> list[int]:
        """Sublayers by how little it matters whether a draft leaves them out: next to break-even first.

        Those that a trained stand-in stands for are not among them.
        """
        free = self._choices.free(draft.stand_in)
        ratio = self._ratio(damage, draft.bridged, free)
        order = np.argsort(ratio, kind="stable")
        skipped = sum(draft.mask[:free])
        break_even = float(ratio[order[max(skipped - 1, 0) : skipped + 1]].mean())
        order_of_closeness: list[int] = np.argsort(np.abs(ratio - break_even), kind="stable").tolist()
        return order_of_closeness

    def _best_prefix(self, damage: Damage, bridged: bool, vocabulary: int, stand_in: int) -> Proposal:
        free = self._choices.free(stand_in)
        # Of several that do no damage at all, the dearest first.
        order = np.lexsort((-self._saved[:free], self._ratio(damage, bridged, free)))
        mask = np.arange(len(self._saved)) >= free
        prefixes = [Draft(tuple(mask.tolist()), bridged, vocabulary, stand_in)]
        for index in order[:-1]:
            mask[index] = True
            prefixes.append(Draft(tuple(mask.tolist()), bridged, vocabulary, stand_in))
        return self._best_of(damage, prefixes)

    def _ratio(self, damage: Damage, bridged: bool, free: int) -> Floats:
        """``[free]``, of the sublayers that may be left out or kept."""
        ratio: Floats = damage.of_sublayers(bridged)[:free] / self._saved[:free]
        return ratio

    def _best_of(self, damage: Damage, drafts: Sequence[Draft]) -> Proposal:
        """The best of drafts that differ in their masks alone."""
        bridged, vocabulary, stand_in = drafts[0].bridged, drafts[0].vocabulary, drafts[0].stand_in
        free = self._choices.free(stand_in)
        masks = np.array([draft.mask[:free] for draft in drafts], dtype=float)  # [drafts, free sublayers]
        total = masks @ damage.of_sublayers(bridged)[:free] + damage.of_extras(bridged, vocabulary, stand_in)
        step_costs = [self._costs.draft_step_cost(draft.mask, bridged, vocabulary, stand_in) for draft in drafts]
        speedups = self._formula(acceptance_of(total), np.array(step_costs))
        best = int(speedups.argmax())
        return Proposal(drafts[best], float(speedups[best]))

    def _flips(self, draft: Draft) -> Iterator[Draft]:
        """Drafts that leave out one sublayer more or less."""
        for index in range(self._choices.free(draft.stand_in)):
            flipped = with_flips(draft, (index,))
            if not all(flipped.mask):  # a draft must keep something
                yield flipped


def with_flips(draft: Draft, indices: Sequence[int]) -> Draft:
    """The draft that leaves out these sublayers where it kept them, and keeps them where it left them out."""
    return replace(draft, mask=tuple(skip != (index in indices) for index, skip in enumerate(draft.mask)))


def _saved_by_each(choices: DraftChoices, costs: DraftCosts) -> Floats:
    """What leaving out each sublayer alone saves of a draft step; above 0, also where a measurement says otherwise."""
    sublayers, vocabulary = len(choices.bits), choices.vocabularies[0]
    nothing = [False] * sublayers
    everything = costs.draft_step_cost(nothing, False, vocabulary, 0)
    saved = []
    for index in range(sublayers):
        alone = [other == index for other in range(sublayers)]
        saved.append(everything - costs.draft_step_cost(alone, False, vocabulary, 0))
    return np.maximum(saved, 1e-6)


def nearby(draft: Draft, order: Sequence[int]) -> Iterator[Draft]:
    """A draft, then those that differ from it by one flip, by two, and so on; earlier indices of ``order`` first."""
    for count in range(len(order) + 1):
        for indices in itertools.combinations(order, count):
            flipped = with_flips(draft, indices)
            if not all(flipped.mask):  # a draft must keep something
                yield flipped
