"""What passes cost on a machine, by width, the sublayers and the head apart; and the speedup that follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


def speedup(acceptance: float, length: int, draft_cost: float, verification: float) -> float:
    """What a round yields over what it costs: ``(1 - α^(γ + 1)) / (1 - α)`` tokens for ``γ·c + v`` plain steps.

    Args:
        acceptance: The acceptance rate α, from 0 to 1.
        length: The draft length γ.
        draft_cost: The cost c of a draft step, in plain decoding steps.
        verification: The cost v of verifying γ + 1 tokens, likewise.
    """
    # Summed up, and not by the closed form, which is 0 ÷ 0 where α is 1.
    return sum(acceptance**i for i in range(length + 1)) / (length * draft_cost + verification)


def best_speedup(acceptance: float, draft_cost: float, verification: Callable[[int], float], longest: int) -> float:
    """The :func:`speedup` at the best draft length.

    Args:
        acceptance: As in :func:`speedup`.
        draft_cost: Likewise.
        verification: The cost of verifying so many tokens, in plain decoding steps.
        longest: The longest draft to consider.
    """
    return max(speedup(acceptance, n, draft_cost, verification(n + 1)) for n in range(1, longest + 1))


# Least share of a pass that its sublayers take, should a noisy moment say that its head took all of it.
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class PassCosts:
    """Seconds of a pass of the target model, by the number of tokens in it.

    Args:
        sublayers: Of all sublayers together.
        head: Of the final norm and the head.
    """

    sublayers: Mapping[int, float]
    head: Mapping[int, float]

    @classmethod
    def of(cls, whole: Mapping[int, float], head: Mapping[int, float]) -> PassCosts:
        """From seconds of whole passes and of their heads: the sublayers are the rest, however noisy the moment was."""
        head = {width: min(head[width], (1 - _LEAST_SHARE) * seconds) for width, seconds in whole.items()}
        return cls({width: seconds - head[width] for width, seconds in whole.items()}, head)

    def seconds(self, width: int) -> float:
        """Of a whole pass of a measured width."""
        return self.sublayers[width] + self.head[width]

    def relative(self, width: int) -> float:
        """The verification cost v: seconds of a pass in units of a plain decoding step."""
        return self.seconds(width) / self.seconds(1)

    def cheapest_width(self, needed: int) -> int:
        """The width, at least ``needed``, whose pass costs least; ``needed`` itself beyond what was measured."""
        wide_enough = [width for width in self.sublayers if width >= needed]
        return min(wide_enough, key=self.seconds, default=needed)

    def saved_by_resuming(self, width: int, share: float) -> float:
        """Seconds saved if a pass starts behind a share of the sublayers, which only one token has yet to go through.

        Negative where that one token costs more than taking all of them along.
        """
        return share * (self.sublayers.get(width, self.sublayers[max(self.sublayers)]) - self.sublayers[1])
