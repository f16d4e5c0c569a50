"""The latency model in the units of speculation's formula: one plain decoding step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layerskip.drafting.config import DraftConfig
from layerskip.engine import PassCosts
from search.builder import DraftBuilder
from search.latency import LatencyModel


class RelativeCosts:
    """What passes cost after a text of some length, in units of one plain decoding step.

    Args:
        latency: What the parts cost.
        builder: Tells how many bridges a draft would get.
        context: Length of the text.
        choice: By which costs the engine chooses the width of a verification.
    """

    def __init__(self, latency: LatencyModel, builder: DraftBuilder, context: float, choice: PassCosts | None) -> None:
        self._latency = latency
        self._builder = builder
        self._context = context
        self._choice = choice
        self._plain = latency.verification(1, 0.0, context, choice)

    def draft_steps(self, options: DraftConfig, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        """``[n]``, one step of each of several drafts with these options that skip ``masks``, ``[n, sublayers]``."""
        below, layer = masks[:, : options.exit_at], options.draft_layer
        layers, bridge = (int(layer is not None and layer.kind == kind) for kind in ("layer", "bridge"))
        attention = (~below[:, 0::2]).sum(axis=1) + layers
        mlp = (~below[:, 1::2]).sum(axis=1) + layers
        bridges = bridge + (self._builder.num_bridges(below) if options.bridges else np.zeros(len(below), dtype=int))
        size = options.vocabulary_size
        seconds = [
            self._latency.parts(*parts, size, self._context)
            for parts in zip(attention.tolist(), mlp.tolist(), bridges.tolist(), strict=True)
        ]
        return np.array(seconds) / self._plain

    def verification(self, width: int) -> float:
        """One pass of the target model over ``width`` tokens."""
        return self._latency.verification(width, 0.0, self._context, self._choice) / self._plain
