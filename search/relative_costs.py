"""The cost model in the units of speculation's formula: one plain decoding step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layerskip.costs import CostModel, DraftParts
from layerskip.drafting.config import DraftConfig
from search.builder import DraftBuilder


class RelativeCosts:
    """What passes cost after a text of some length, in units of one plain decoding step.

    Args:
        costs: What passes cost.
        builder: Tells how many bridges a draft would get.
        context: Length of the text.
    """

    def __init__(self, costs: CostModel, builder: DraftBuilder, context: float) -> None:
        self._costs = costs.at(context).relative()
        self._builder = builder

    def draft_steps(self, options: DraftConfig, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        """``[n]``, one step of each of several drafts with these options that skip ``masks``, ``[n, sublayers]``."""
        below, layer = masks[:, : options.exit_at], options.draft_layer
        layers, bridge = (int(layer is not None and layer.kind == kind) for kind in ("layer", "bridge"))
        attention = (~below[:, 0::2]).sum(axis=1) + layers
        mlp = (~below[:, 1::2]).sum(axis=1) + layers
        bridges = bridge + (self._builder.num_bridges(below) if options.bridges else np.zeros(len(below), dtype=int))
        counts = zip(attention.tolist(), mlp.tolist(), bridges.tolist(), strict=True)
        return np.array([self._costs.draft_step(DraftParts(*parts, options.vocabulary_size)) for parts in counts])

    def verification(self, width: int) -> float:
        """One pass of the target model over ``width`` tokens."""
        return self._costs.verification(width)
