"""Which of the proposed tokens stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What verification made of a draft.

    Args:
        tokens: The drafted tokens that stand, and behind them the full model's own next token.
    """

    tokens: list[int]

    @property
    def accepted(self) -> int:
        """How many drafted tokens stand."""
        return len(self.tokens) - 1


def greedy_match(drafted: Tensor, logits: Tensor) -> Verdict:
    """Accept drafted tokens while they are what the full model would have chosen.

    Args:
        drafted: ``[k]``, proposed token ids.
        logits: ``[k + 1, vocab_size]``, the full model's, before each proposed token and behind the last.
    """
    # One transfer to the host.
    *proposals, choices = torch.split(torch.cat([drafted, logits.argmax(-1)]).cpu(), [len(drafted), len(logits)])
    choice = choices.tolist()
    accepted = 0
    for proposal in proposals[0].tolist():
        if proposal != choice[accepted]:
            break
        accepted += 1
    return Verdict(choice[: accepted + 1])


def speculative_sampling(drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator) -> Verdict:
    """Accept or replace drafted tokens so that the output is distributed as the full model's own samples.

    A token ``x`` that was drawn from the draft distribution ``q`` stands with probability ``min(1, p(x) / q(x))``
    under the target distribution ``p``. The first that does not is replaced by a draw from ``max(p - q, 0)``,
    normalized; behind a draft that stands whole, one more token is drawn from ``p``.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318).

    Args:
        drafted: ``[k]``, proposed token ids, each drawn from its row of ``draft``.
        draft: ``[k, vocab_size]``, the distributions that the draft drew from.
        target: ``[k + 1, vocab_size]``, the full model's distributions, before each proposal and behind the last.
        generator: Source of randomness, on the same device.
    """
    k = len(drafted)
    each = torch.arange(k, device=drafted.device)
    p, q = target[each, drafted], draft[each, drafted]
    # u < p / q, written without the division
    stands = torch.rand(k, generator=generator, device=drafted.device) * q < p
    accepted = int(stands.long().cumprod(0).sum())
    remaining = target[accepted]
    if accepted < k:
        # A rejection means p(x) < q(x) for some x, so something is left of p - q elsewhere; by rounding, maybe nothing.
        left = (remaining - draft[accepted]).clamp_(min=0)
        remaining = torch.where(left.sum() > 0, left, remaining)
    own = torch.multinomial(remaining, 1, generator=generator)
    return Verdict(torch.cat([drafted[:accepted], own]).tolist())
