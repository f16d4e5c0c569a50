"""Which of the proposed tokens stand.

Everything is decided where the logits are, without a branch, and comes to the host in one transfer at the end: each
transfer makes the host wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What verification made of a draft.

    Args:
        tokens: The drafted tokens that stand, and behind them the full model's own next token.
        newest: ``[1]``, that last token, where the model is.
    """

    tokens: list[int]
    newest: Tensor

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
    choices = logits.argmax(-1)
    accepted = _length_of_run(drafted == choices[:-1])
    newest = choices.index_select(0, accepted)
    *tokens, count = torch.cat([choices, accepted]).tolist()
    return Verdict(tokens[: count + 1], newest)


def _length_of_run(stands: Tensor) -> Tensor:
    """How many flags, of ``[k]``, are true before the first that is not: ``[1]``."""
    return stands.long().cumprod(0).sum(0, keepdim=True)


def sample(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index, ``[1]``, from probabilities ``[n]`` that need not be normalized.

    The first of ``n`` independent exponential clocks with these rates to ring. ``torch.multinomial`` would check the
    probabilities on the host, which waits for the device.
    """
    # exponential_() never gives 0, so what has probability 0 never wins.
    return (probabilities / torch.empty_like(probabilities).exponential_(1, generator=generator)).argmax(-1, True)


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
    accepted = _length_of_run(stands)
    # Selected by a tensor: an index that the host had to know would make it wait.
    remaining = target.index_select(0, accepted)[0]
    replaced = torch.cat([draft, torch.zeros_like(target[:1])]).index_select(0, accepted)[0]  # 0 behind the draft
    newest = _replacement(replaced, remaining, generator)
    *proposed, own, count = torch.cat([drafted, newest, accepted]).tolist()
    return Verdict([*proposed[:count], own], newest)


def speculative_choice(drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """The token that :func:`speculative_sampling` puts where one was drafted, ``[1]``: that one, or its replacement.

    For target distributions that are known one at a time only, because they depend on the tokens before.

    Args:
        drafted: ``[1]``, drawn from ``draft``.
        draft: ``[vocab_size]``, what the draft drew from.
        target: ``[vocab_size]``, the full model's distribution.
        generator: As in :func:`speculative_sampling`.
    """
    u = torch.rand(1, generator=generator, device=drafted.device)
    return torch.where(u * draft[drafted] < target[drafted], drafted, _replacement(draft, target, generator))


def _replacement(draft: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """A draw, ``[1]``, from ``max(p - q, 0)``, normalized."""
    # A rejection means p(x) < q(x) for some x, so something is left of p - q elsewhere; by rounding, maybe nothing.
    left = (target - draft).clamp_(min=0)
    return sample(torch.where(left.sum() > 0, left, target), generator)
