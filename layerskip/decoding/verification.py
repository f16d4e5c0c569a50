"""Which of the proposed tokens stand.

For every row of a draft's tree a token is chosen that follows it, should the text come there: the full model's
likeliest, or a sample from its distribution that prefers what was drafted. The text then runs through the tree while
the chosen tokens were drafted. Everything is decided where the logits are, without a branch, and comes to the host in
one transfer: each transfer makes the host wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.stack.tree import Tree, siblings_on


@dataclass(frozen=True)
class Verdict:
    """What verification made of a draft.

    Args:
        tokens: The drafted tokens that stand, and behind them the full model's own next token.
        newest: ``[1]``, that last token, where the model is.
        rows: The rows of the draft's tree that the text runs through: row 0, and those of the tokens that stand.
    """

    tokens: list[int]
    newest: Tensor
    rows: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """How many drafted tokens stand."""
        return len(self.tokens) - 1

    @classmethod
    def of(cls, tree: Tree, drafted: Tensor, choices: Tensor) -> Verdict:
        """The verdict by what follows each row.

        Args:
            tree: The shape of the draft, of ``k`` tokens.
            drafted: ``[k]``, their ids.
            choices: ``[k + 1]``, the ids that were chosen to follow each row.
        """
        ids = torch.cat([drafted, choices]).tolist()
        proposed, following = ids[: len(drafted)], ids[len(drafted) :]
        rows = tree.follow(proposed, following)
        return cls([following[row] for row in rows], choices[rows[-1] : rows[-1] + 1], rows)


def greedy_match(tree: Tree, drafted: Tensor, logits: Tensor) -> Verdict:
    """Accept drafted tokens while they are what the full model would have chosen.

    Args:
        tree: The shape of the draft, of ``k`` tokens.
        drafted: ``[k]``, proposed token ids.
        logits: ``[k + 1, vocab_size]``, the full model's, behind each row.
    """
    return Verdict.of(tree, drafted, logits.argmax(-1))


def sample(probabilities: Tensor, generator: torch.Generator, count: int = 1) -> Tensor:
    """Draw indices, ``[count]``, without replacement, from probabilities ``[n]`` that need not be normalized.

    The first of ``n`` independent exponential clocks with these rates to ring, in order. ``torch.multinomial`` would
    check the probabilities on the host, which waits for the device.
    """
    # exponential_() never gives 0, so what has probability 0 comes last.
    rates = probabilities / torch.empty_like(probabilities).exponential_(1, generator=generator)
    return rates.argmax(-1, True) if count == 1 else rates.topk(count).indices


def speculative_sampling(
    tree: Tree, drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator
) -> Verdict:
    """Accept or replace drafted tokens so that the output is distributed as the full model's own samples.

    Behind each row the drafted siblings are tried in turn. One that was drawn from the draft distribution ``q`` stands
    with probability ``min(1, p(x) / q(x))`` under the target distribution ``p``. If it does not, ``p`` becomes
    ``max(p - q, 0)`` and ``q`` loses that token, both normalized, and the next sibling is tried; if none stands, a draw
    from what is left of ``p`` follows.

    Sources: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318); for siblings
    drawn without replacement, Jeon et al. 2024 (arXiv 2402.14160), Chen et al. 2024 (Sequoia, arXiv 2402.12374).

    Args:
        tree: The shape of the draft, of ``k`` tokens, ``n`` of whose rows have others behind them.
        drafted: ``[k]``, proposed token ids; those behind one row were drawn from its row of ``draft`` in turn, without
            replacement.
        draft: ``[n, vocab_size]``, the distributions that the draft drew from.
        target: ``[k + 1, vocab_size]``, the full model's distributions behind each row.
        generator: Source of randomness, on the same device.
    """
    settled = torch.full((len(target),), -1, device=drafted.device)
    if len(drafted):
        inner, indices, there = siblings_on(tree, drafted.device)
        stands, left = _settle(drafted[indices], there, draft, target.index_select(0, inner), generator)
        settled, target = settled.index_copy(0, inner, stands), target.index_copy(0, inner, left)
    # One draw of the clocks for all rows: at most one row's own token comes to be.
    clocks = torch.empty_like(target[0]).exponential_(1, generator=generator)
    return Verdict.of(tree, drafted, torch.where(settled < 0, (target / clocks).argmax(-1), settled))


def speculative_choice(drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """The token that :func:`speculative_sampling` chooses behind one row, ``[1]``.

    For target distributions that are known one at a time only, because they depend on the tokens before.

    Args:
        drafted: ``[b]``, the siblings behind the row.
        draft: ``[vocab_size]``, what they were drawn from.
        target: ``[vocab_size]``, the full model's distribution.
        generator: As in :func:`speculative_sampling`.
    """
    there = torch.ones_like(drafted, dtype=torch.bool)
    settled, left = _settle(drafted[None], there[None], draft[None], target[None], generator)
    return torch.where(settled < 0, sample(left[0], generator), settled)


def _settle(
    candidates: Tensor, there: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Try siblings in turn.

    Args:
        candidates: ``[n, b]``, their ids behind each of ``n`` rows.
        there: ``[n, b]``, which of them there are.
        draft: ``[n, vocab_size]``.
        target: ``[n, vocab_size]``.
        generator: Source of randomness.

    Returns:
        The one that stands behind each row, ``[n]``, -1 where none does; and what is left of ``target`` there.
    """
    settled = torch.full_like(candidates[:, 0], -1)
    for number in range(candidates.shape[1]):
        token = candidates[:, number : number + 1]  # [n, 1]
        p, q = target.gather(1, token)[:, 0], draft.gather(1, token)[:, 0]
        u = torch.rand(len(token), generator=generator, device=token.device)
        tried = there[:, number] & (settled < 0)
        stands = tried & (q > 0) & (u * q < p)  # u < p / q, without the division; where q is 0 nothing was drawn
        settled = torch.where(stands, token[:, 0], settled)
        fails = (tried & ~stands)[:, None]
        # A rejection means p(x) < q(x) for some x, so something is left of p - q elsewhere; by rounding, maybe nothing.
        rest = (target - draft).clamp_(min=0)
        target = torch.where(fails & (rest.sum(-1, keepdim=True) > 0), _normalized(rest), target)
        if number + 1 < candidates.shape[1]:
            draft = torch.where(fails, _normalized(draft.scatter(1, token, 0.0)), draft)
    return settled, target


def _normalized(weights: Tensor) -> Tensor:
    """Rows that sum up to 1; 0 where nothing is left."""
    return weights / weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).tiny)
