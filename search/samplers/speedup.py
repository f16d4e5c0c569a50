"""The speedup that a draft's acceptance rate and costs predict (Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from layerskip.drafting.config import DraftConfig

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]


class DraftCosts(Protocol):
    """What passes cost, in units of one plain decoding step."""

    def draft_steps(self, options: DraftConfig, masks: Masks) -> Floats:
        """Costs of one step of several drafts.

        Args:
            options: What they have in common: bridges, draft layer and draft vocabulary; not the skip set.
            masks: ``[n, 2 * num_layers]``, what each skips.

        Returns:
            ``[n]``.
        """

    def verification(self, width: int) -> float:
        """Cost of one pass of the target model over ``width`` tokens."""


@dataclass(frozen=True, eq=False)
class SpeedupFormula:
    """``(1 - α^(γ+1)) / (1 - α) ÷ (γ c + v(γ+1))`` at the best of some draft lengths γ.

    Args:
        verification: ``v(2), v(3), …``: what verifying a draft of 1, 2, … tokens costs, each above 0.
    """

    verification: Floats

    @classmethod
    def of(cls, costs: DraftCosts, max_draft_length: int) -> SpeedupFormula:
        """For drafts of 1 to ``max_draft_length`` tokens."""
        return cls(np.array([costs.verification(length + 1) for length in range(1, max_draft_length + 1)]))

    def __call__(self, acceptance: Floats, step_cost: Floats) -> Floats:
        """Speedups of several drafts.

        Args:
            acceptance: ``[n]``, α of each, from 0 to 1.
            step_cost: ``[n]``, c of each.

        Returns:
            ``[n]``.
        """
        lengths = np.arange(1, len(self.verification) + 1)
        # Summed up, and not by the closed form, which is 0 ÷ 0 where α is 1.
        tokens = 1 + np.cumsum(acceptance[:, None] ** lengths, axis=1)  # [n, lengths]
        best: Floats = (tokens / (lengths * step_cost[:, None] + self.verification)).max(axis=1)
        return best
