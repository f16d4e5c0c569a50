"""What drafting gains if every token is accepted alike: the formula of speculative decoding.

Source: Leviathan et al. 2023 (arXiv 2211.17192), theorem 3.8, with a verification cost of its own.
"""

from __future__ import annotations

from collections.abc import Callable


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
