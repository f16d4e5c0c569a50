"""The candidate of highest predicted speedup, given the damage and the cost of each part of a draft."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from layerskip.drafting.config import DraftConfig
from layerskip.skip_set import SkipSet
from search.samplers.draft_costs import DraftCosts, Floats, Masks
from search.space import SearchSpace
from studies.acceptance_model import Damage, acceptance_of


@dataclass(frozen=True, eq=False)
class Proposal:
    """A candidate with its predicted speedup.

    Args:
        options: Everything but its skip set.
        mask: ``[2 * num_layers]``, what it skips.
        speedup: Predicted.
    """

    options: DraftConfig
    mask: Masks
    speedup: float

    @property
    def config(self) -> DraftConfig:
        """The candidate."""
        return replace(self.options, skip_set=SkipSet.from_mask(self.mask.tolist()))


class DraftMaximizer:
    """Finds the candidate of highest predicted speedup.

    Sublayers are skipped in the order of damage ÷ cost, as many as pay: the fractional knapsack, whose optimum lies at
    a breakpoint. Flips of single sublayers then improve it, for the speedup is not linear and bridges replace runs.

    Thousands of skip sets are compared for a proposal, as rows of one array.

    Args:
        space: The candidates to choose among.
        costs: Of drafts.
    """

    def __init__(self, space: SearchSpace, costs: DraftCosts) -> None:
        self._space = space
        self._costs = costs
        self._saved = self._saved_by_each()

    def best(self, damage: Damage) -> Proposal:
        """The best candidate if the damage is this."""
        starts = [self._best_prefix(damage, options) for options in self._space.options]
        best = max(starts, key=lambda proposal: proposal.speedup)
        while True:
            flips = best.mask ^ np.eye(len(best.mask), dtype=bool)[: best.options.exit_at]
            kept = flips[~flips.all(axis=1)]  # a draft must keep something
            if not len(kept):
                return best
            flipped = self._best_of(damage, best.options, kept)
            if flipped.speedup <= best.speedup:
                return best
            best = flipped

    def nearest_to_break_even(self, damage: Damage, config: DraftConfig) -> list[int]:
        """Sublayers by how little it matters whether a candidate skips them: next to break-even first.

        Those that a draft layer replaces are not among them.
        """
        ratio = self._ratio(damage, config)
        order = np.argsort(ratio, kind="stable")
        skipped = len(config.skipped_below)
        break_even = float(ratio[order[max(skipped - 1, 0) : skipped + 1]].mean())
        order_of_closeness: list[int] = np.argsort(np.abs(ratio - break_even), kind="stable").tolist()
        return order_of_closeness

    def _best_prefix(self, damage: Damage, options: DraftConfig) -> Proposal:
        # Of several that do no damage at all, the most expensive first.
        order = np.lexsort((-self._saved[: options.exit_at], self._ratio(damage, options)))
        rank = np.full(len(self._saved), -1)  # what a draft layer replaces is always skipped
        rank[order] = np.arange(len(order))
        return self._best_of(damage, options, rank < np.arange(len(order))[:, None])

    def _ratio(self, damage: Damage, options: DraftConfig) -> Floats:
        """``[exit_at]``, damage ÷ cost of the sublayers that may be skipped or kept."""
        ratio: Floats = damage.of_sublayers(options.bridges)[: options.exit_at] / self._saved[: options.exit_at]
        return ratio

    def _best_of(self, damage: Damage, options: DraftConfig, masks: Masks) -> Proposal:
        """The best of ``n`` candidates that differ in their masks alone, ``[n, 2 * num_layers]``."""
        below = slice(options.exit_at)
        total = masks[:, below] @ damage.of_sublayers(options.bridges)[below] + damage.of_options(options)
        speedups = self._costs.best_speedups(acceptance_of(total), self._costs.draft_steps(options, masks))
        best = int(speedups.argmax())
        return Proposal(options, masks[best], float(speedups[best]))

    def _saved_by_each(self) -> Floats:
        """What skipping each sublayer alone saves of a draft step; above 0, also where a measurement says otherwise."""
        sublayers = 2 * self._space.num_layers
        plain, masks = self._space.options[0], np.eye(sublayers + 1, sublayers, dtype=bool)
        costs = self._costs.draft_steps(plain, masks)  # of skipping each, and nothing
        saved: Floats = np.maximum(costs[-1] - costs[:-1], 1e-6)
        return saved
