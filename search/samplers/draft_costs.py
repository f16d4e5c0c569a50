"""Costs of drafts and the speedup that they predict, for many drafts at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from layerskip.costs import Costs, DraftParts
from layerskip.drafting.config import DraftConfig

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class DraftCosts:
    """What drafts cost after a text of usual length, in plain decoding steps.

    Args:
        costs: Of passes, likewise.
        num_bridges: Tells how many bridges drafts with bridges get, ``[n]``, that skip the ``[n, sublayers]``.
        max_draft_length: Longest draft to consider.
    """

    costs: Costs
    num_bridges: Callable[[Masks], NDArray[np.intp]]
    max_draft_length: int

    def draft_steps(self, options: DraftConfig, masks: Masks) -> Floats:
        """Costs of one step of several drafts.

        Args:
            options: Their common precision, bridges, draft layer and draft vocabulary; the skip set does not count.
            masks: ``[n, 2 * num_layers]``, the sublayers that each skips.

        Returns:
            ``[n]``.
        """
        below, layer = masks[:, : options.exit_at], options.draft_layer
        layers, bridge = (int(layer is not None and layer.kind == kind) for kind in ("layer", "bridge"))
        attention, mlp = (~below[:, 0::2]).sum(axis=1), (~below[:, 1::2]).sum(axis=1)
        bridges = bridge + (self.num_bridges(below) if options.bridges else np.zeros(len(below), dtype=int))
        counts = zip(attention.tolist(), mlp.tolist(), bridges.tolist(), strict=True)
        rest = (options.vocabulary_size, options.precision, layers)
        return np.array([self.costs.draft_step(DraftParts(*parts, *rest)) for parts in counts])

    @cached_property
    def verification(self) -> Floats:
        """``v(2), v(3), …``: the costs of verifying drafts of 1, 2, … tokens."""
        return np.array([self.costs.verification(length + 1) for length in range(1, self.max_draft_length + 1)])

    def best_speedups(self, acceptance: Floats, step_cost: Floats) -> Floats:
        """Speedups ``[n]`` of several drafts, each at its best draft length; see :func:`layerskip.costs.speedup`.

        Args:
            acceptance: ``[n]``, α of each, from 0 to 1.
            step_cost: ``[n]``, c of each.
        """
        lengths = np.arange(1, self.max_draft_length + 1)
        tokens = 1 + np.cumsum(acceptance[:, None] ** lengths, axis=1)  # [n, lengths]
        best: Floats = (tokens / (lengths * step_cost[:, None] + self.verification)).max(axis=1)
        return best
