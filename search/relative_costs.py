"""The latency model in the units of speculation's formula: one plain decoding step."""

from __future__ import annotations

from collections.abc import Sequence

from layerskip.engine import PassCosts
from layerskip.stack.skipset import SkipSet
from search.assets import AssetMaker
from search.latency import LatencyModel


class RelativeCosts:
    """What passes cost behind a text of some length, in units of one plain decoding step.

    Args:
        latency: What the parts cost.
        makers: Tells how many bridges a draft would get.
        context: Length of the text.
        choice: By which costs the engine chooses the width of a verification.
    """

    def __init__(self, latency: LatencyModel, makers: AssetMaker, context: float, choice: PassCosts | None) -> None:
        self._latency = latency
        self._makers = makers
        self._context = context
        self._choice = choice
        self._plain = latency.verification(1, 0.0, context, choice)

    def draft_step_cost(self, mask: Sequence[bool], bridged: bool, vocabulary: int) -> float:
        """One step of a draft."""
        attention = sum(not skip for skip in mask[::2])
        mlp = sum(not skip for skip in mask[1::2])
        bridges = 0 if not bridged or all(mask) else self._makers.num_bridges(SkipSet.from_mask(mask))
        return self._latency.parts(attention, mlp, bridges, vocabulary, self._context) / self._plain

    def verification_cost(self, width: int) -> float:
        """One pass of the full model over ``width`` tokens."""
        return self._latency.verification(width, 0.0, self._context, self._choice) / self._plain
