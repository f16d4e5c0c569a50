"""The latency model in the units of speculation's formula: one plain decoding step."""

from __future__ import annotations

from collections.abc import Sequence

from layerskip.engine import PassCosts
from layerskip.skip_set import SkipSet
from search.builder import DraftBuilder
from search.draft_layers import DraftLayerRef
from search.latency import LatencyModel


class RelativeCosts:
    """What passes cost behind a text of some length, in units of one plain decoding step.

    Args:
        latency: What the parts cost.
        makers: Tells how many bridges a draft would get.
        context: Length of the text.
        choice: By which costs the engine chooses the width of a verification.
        stand_ins: The trained ones that drafts may have, by their number from 1 on.
    """

    def __init__(
        self,
        latency: LatencyModel,
        makers: DraftBuilder,
        context: float,
        choice: PassCosts | None,
        stand_ins: Sequence[DraftLayerRef] = (),
    ) -> None:
        self._latency = latency
        self._makers = makers
        self._context = context
        self._choice = choice
        self._stand_ins = stand_ins
        self._plain = latency.verification(1, 0.0, context, choice)

    def draft_step_cost(self, mask: Sequence[bool], bridged: bool, vocabulary: int, stand_in: int) -> float:
        """One step of a draft."""
        trained = self._stand_ins[stand_in - 1] if stand_in else None
        exit_at = trained.start if trained else len(mask)
        layers, bridges = (int(trained is not None and trained.kind == kind) for kind in ("layer", "bridge"))
        attention = sum(not skip for skip in mask[:exit_at:2]) + layers
        mlp = sum(not skip for skip in mask[1:exit_at:2]) + layers
        if bridged and not all(mask):
            below = [skip and index < exit_at for index, skip in enumerate(mask)]
            bridges += self._makers.num_bridges(SkipSet.from_mask(below))
        return self._latency.parts(attention, mlp, bridges, vocabulary, self._context) / self._plain

    def verification_cost(self, width: int) -> float:
        """One pass of the target model over ``width`` tokens."""
        return self._latency.verification(width, 0.0, self._context, self._choice) / self._plain
