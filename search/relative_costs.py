"""What drafts cost a sampler's formula, in plain decoding steps."""

from __future__ import annotations

from collections.abc import Sequence

from layerskip.costs import CostModel, DraftParts
from layerskip.skip_set import SkipSet
from search.builder import DraftBuilder
from search.draft_layers import DraftLayerRef


class RelativeCosts:
    """What passes cost after a text of some length, in units of one plain decoding step.

    Args:
        latency: What the parts cost.
        makers: Tells how many bridges a draft would get.
        context: Length of the text.
        stand_ins: The trained ones that drafts may have, by their number from 1 on.
    """

    def __init__(
        self,
        latency: CostModel,
        makers: DraftBuilder,
        context: float,
        stand_ins: Sequence[DraftLayerRef] = (),
    ) -> None:
        self._costs = latency.at(context).relative()
        self._makers = makers
        self._stand_ins = stand_ins

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
        return self._costs.draft_step(DraftParts(attention, mlp, bridges, vocabulary))

    def verification_cost(self, width: int) -> float:
        """One pass of the target model over ``width`` tokens."""
        return self._costs.verification(width)
