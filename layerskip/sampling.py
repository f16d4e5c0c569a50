"""Choose the next token, and verify drafted tokens against the target model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from layerskip.checks import real_number, whole_number
from layerskip.engine import DraftStep, SharedPrefix
from layerskip.errors import InvalidInputError, NotANumberError
from layerskip.token_tree import TokenTree, numbers_on, siblings_on
from layerskip.utils import numbers_to

# Below this temperature scores divided by it overflow, and nothing but the likeliest token has a chance.
_COLDEST = 1e-30
# Stands for a token that was chosen by scores that are not numbers, until the host looks at it.
NOT_A_NUMBER = -1


def highest(scores: Tensor) -> Tensor:
    """The column of the highest score in each row, ``[n]``, of ``[n, m]``; ``NOT_A_NUMBER`` where one is none."""
    best = scores.max(-1)  # as argmax, in a third of its time on a CPU; what is not a number counts as the highest
    return torch.where(best.values.isnan(), NOT_A_NUMBER, best.indices)


def check_numbers(tokens: Sequence[int]) -> None:
    """Make sure that new tokens were chosen by numbers.

    Raises:
        NotANumberError: One was not.
    """
    if NOT_A_NUMBER in tokens:
        raise NotANumberError(
            "logits: the model's scores for the next token are not numbers (nan); check its weights and dtype"
        )


@dataclass(frozen=True)
class Verdict:
    """The result of verifying a draft.

    Args:
        tokens: The accepted tokens, and after them the target model's own next token.
        newest: ``[1]``, that last token, where the model is.
        rows: The rows of the draft's tree that the text runs through: row 0, and those of the accepted tokens.
    """

    tokens: list[int]
    newest: Tensor
    rows: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """Number of accepted tokens."""
        return len(self.tokens) - 1

    @classmethod
    def of(cls, tree: TokenTree, drafted: Tensor, choices: Tensor) -> Verdict:
        """The verdict by the token that follows each row.

        Args:
            tree: The shape of the draft, of ``k`` tokens.
            drafted: ``[k]``, their ids.
            choices: ``[k + 1]``, the ids chosen to follow each row.

        Raises:
            NotANumberError: A row of the text was followed by what is not a number's.
        """
        ids = torch.cat([drafted, choices]).tolist()
        proposed, following = ids[: len(drafted)], ids[len(drafted) :]
        rows = tree.follow(proposed, following)
        tokens = [following[row] for row in rows]
        check_numbers(tokens)
        return cls(tokens, choices[rows[-1] : rows[-1] + 1], rows)


def greedy_match(tree: TokenTree, drafted: Tensor, logits: Tensor) -> Verdict:
    """Accept drafted tokens while they are what the target model would have chosen.

    Args:
        tree: The shape of the draft, of ``k`` tokens.
        drafted: ``[k]``, proposed token ids.
        logits: ``[k + 1, vocab_size]``, the target model's, after each row.
    """
    return Verdict.of(tree, drafted, highest(logits))


def sample(probabilities: Tensor, generator: torch.Generator, count: int = 1) -> Tensor:
    """Draw indices, ``[count]``, without replacement, from probabilities ``[n]`` that need not be normalized.

    The first of ``n`` independent exponential clocks with these rates to ring, in order. ``torch.multinomial`` would
    check the probabilities on the host, which waits for the device.
    """
    # exponential_() never gives 0, so what has probability 0 comes last.
    rates = probabilities / torch.empty_like(probabilities).exponential_(1, generator=generator)
    return rates.argmax(-1, True) if count == 1 else rates.topk(count).indices


def speculative_sampling(
    tree: TokenTree, drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator
) -> Verdict:
    """Accept or replace drafted tokens so that the output is distributed as the target model's own samples.

    After each row the drafted siblings are tried in turn. One that was drawn from the draft distribution ``q`` is
    accepted with probability ``min(1, p(x) / q(x))`` under the target distribution ``p``. If it is rejected, ``p``
    becomes ``max(p - q, 0)`` and ``q`` loses that token, both normalized, and the next sibling is tried; if none is
    accepted, a draw from what is left of ``p`` follows. Where ``q`` is not a number, nothing was drawn: the token
    counts as one that was certain.

    Sources: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318); for siblings
    drawn without replacement, Jeon et al. 2024 (arXiv 2402.14160), Chen et al. 2024 (Sequoia, arXiv 2402.12374).

    Args:
        tree: The shape of the draft, of ``k`` tokens, ``n`` of whose rows are followed by others.
        drafted: ``[k]``, proposed token ids; those after the same row were drawn from its row of ``draft`` in turn,
            without replacement.
        draft: ``[n, vocab_size]``, the distributions that the draft drew from.
        target: ``[k + 1, vocab_size]``, the target model's distributions after each row.
        generator: Source of randomness, on the same device.
    """
    chosen = torch.full((len(target),), -1, device=drafted.device)
    if len(drafted):
        inner, indices, exists = siblings_on(tree, drafted.device)
        accepted, left = _accept(drafted[indices], exists, draft, target.index_select(0, inner), generator)
        chosen, target = chosen.index_copy(0, inner, accepted), target.index_copy(0, inner, left)
    # One draw of the clocks for all rows: at most one row's own token becomes part of the text.
    clocks = torch.empty_like(target[0]).exponential_(1, generator=generator)
    return Verdict.of(tree, drafted, torch.where(chosen < 0, highest(target / clocks), chosen))


def speculative_choice(drafted: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """The token that :func:`speculative_sampling` chooses after one row, ``[1]``.

    For target distributions that are known one at a time only, because they depend on the tokens before.

    Args:
        drafted: ``[b]``, the siblings after the row.
        draft: ``[vocab_size]``, the distribution that they were drawn from.
        target: ``[vocab_size]``, the target model's distribution.
        generator: As in :func:`speculative_sampling`.
    """
    exists = torch.ones_like(drafted, dtype=torch.bool)
    accepted, left = _accept(drafted[None], exists[None], draft[None], target[None], generator)
    return torch.where(accepted < 0, sample(left[0], generator), accepted)


def _accept(
    siblings: Tensor, exists: Tensor, draft: Tensor, target: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Try siblings in turn.

    Args:
        siblings: ``[n, b]``, their ids after each of ``n`` rows.
        exists: ``[n, b]``, which of them there are.
        draft: ``[n, vocab_size]``.
        target: ``[n, vocab_size]``.
        generator: Source of randomness.

    Returns:
        The accepted token after each row, ``[n]``, -1 where none is; and what is left of ``target`` there.
    """
    chosen = torch.full_like(siblings[:, 0], -1)
    broken = draft.gather(1, siblings[:, :1]).isnan()  # [n, 1]; after a softmax, all of a row or nothing
    for number in range(siblings.shape[1]):
        token = siblings[:, number : number + 1]  # [n, 1]
        draft = torch.where(broken, torch.zeros_like(draft).scatter(1, token, 1.0), draft)
        p, q = target.gather(1, token)[:, 0], draft.gather(1, token)[:, 0]
        u = torch.rand(len(token), generator=generator, device=token.device)
        tried = exists[:, number] & (chosen < 0)
        accepted = tried & (q > 0) & (u * q < p)  # u < p / q, without the division; where q is 0 nothing was drawn
        chosen = torch.where(accepted, token[:, 0], chosen)
        rejected = (tried & ~accepted)[:, None]
        # A rejection means p(x) < q(x) for some x, so something is left of p - q elsewhere; by rounding, maybe nothing.
        rest = (target - draft).clamp_(min=0)
        target = torch.where(rejected & (rest.sum(-1, keepdim=True) > 0), _normalized(rest), target)
        if number + 1 < siblings.shape[1]:
            draft = torch.where(rejected, _normalized(draft.scatter(1, token, 0.0)), draft)
    return chosen, target


def _normalized(weights: Tensor) -> Tensor:
    """Rows that sum up to 1; 0 where nothing is left."""
    return weights / weights.sum(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).tiny)


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; the default is greedy.

    Args:
        temperature: 0 always takes the likeliest token; above, logits are divided by it before sampling.
        top_k: Sample among this many likeliest tokens; 0 for all.
        top_p: Sample among the likeliest tokens that together have this probability, in ``(0, 1]``; 1 for all.
        seed: Makes sampling repeatable, in ``[0, 2**64)``; None draws a new seed each time. What is drafted has a part
            in what is drawn: a drafter that learns from each text, as that of a search's profile, has to be new, too.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, convert in (("temperature", real_number), ("top_p", real_number), ("top_k", whole_number)):
            object.__setattr__(self, name, convert(name, getattr(self, name)))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole_number("seed", self.seed))
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInputError(f"temperature: expected a number from 0 on, got {self.temperature}")
        if self.top_k < 0:
            raise InvalidInputError(f"top_k: expected a whole number from 0 on, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InvalidInputError(f"seed: expected a whole number from 0 to 2**64 - 1, got {self.seed}")

    def sampler(self, device: torch.device) -> Sampler:
        """A fresh sampler for one generation."""
        if self.temperature < _COLDEST:
            return GreedySampler()
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return RandomSampler(self._warpers(), generator)

    def _warpers(self) -> LogitsProcessorList:
        """transformers' own, in generate()'s order, so that the distribution is that of model.generate()."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


@dataclass(frozen=True)
class Draw:
    """Chosen tokens for one place in the text, and the distribution that they were drawn from.

    Args:
        tokens: ``[b]``, their ids, drawn in turn without replacement; a draft continues after the first.
        distribution: ``[n]``, the probabilities that they were drawn from, one for each token that was scored; None
            where nothing was drawn.
    """

    tokens: Tensor
    distribution: Tensor | None


@dataclass(frozen=True)
class Draft:
    """Tokens proposed to continue the text.

    Args:
        tokens: ``[k]``, their ids; k may be 0.
        tree: Which of them follows which.
        distributions: For each row of the tree that others follow, in order, the distribution that these were drawn
            from, ``[vocab_size]``, or a probability for each of ``token_ids``; None where nothing was drawn: under
            greedy choice, and of tokens that are certain.
        token_ids: ``[n]``, the draft vocabulary; None for the whole one.
        shared: Hidden states of the target model's pass that drafting already computed, if any.
    """

    tokens: Tensor
    tree: TokenTree
    distributions: tuple[Tensor | None, ...]
    token_ids: Tensor | None = None
    shared: SharedPrefix | None = None

    @classmethod
    def of(
        cls,
        draws: list[Draw],
        device: torch.device,
        *,
        token_ids: Tensor | None = None,
        shared: SharedPrefix | None = None,
    ) -> Draft:
        """The draft of some draws, each after the first token of the one before: a chain with leaves."""
        chain, leaves = [d.tokens[:1] for d in draws], [d.tokens[1:] for d in draws]
        tokens = torch.cat([*chain, *leaves]) if draws else torch.empty(0, dtype=torch.long, device=device)
        tree = TokenTree.comb(len(d.tokens) for d in draws)
        return cls(tokens, tree, tuple(d.distribution for d in draws), token_ids, shared)

    @classmethod
    def grown(
        cls,
        draws: list[Draw],
        widths: Sequence[Sequence[int]],
        device: torch.device,
        *,
        token_ids: Tensor | None = None,
    ) -> Draft:
        """The draft of some draws, place by place.

        Args:
            draws: For each place, and there for each token of the place before that others follow, in order.
            widths: As in :meth:`TokenTree.grown`.
            device: Where the tokens are.
            token_ids: As in the class.
        """
        tokens = torch.cat([d.tokens for d in draws]) if draws else torch.empty(0, dtype=torch.long, device=device)
        return cls(tokens, TokenTree.grown(widths), tuple(d.distribution for d in draws), token_ids)

    @classmethod
    def certain(cls, tokens: Sequence[int], device: torch.device) -> Draft:
        """The draft of tokens that were not drawn, such as those copied from the text: a chain."""
        return cls(numbers_to(device, tokens), TokenTree.chain(len(tokens)), (None,) * len(tokens))

    @property
    def main_path(self) -> Tensor:
        """The drafted tokens, from the first place on, each the first that follows the one before."""
        return self.tokens.index_select(0, numbers_on(self.tree.main_path, self.tokens.device)[1:] - 1)

    def continued(self, tokens: Sequence[int]) -> Draft:
        """The same with further tokens after the main path, which were not drawn."""
        if not tokens:
            return self
        tree = self.tree.continued(len(tokens))
        drawn_from = dict(zip(self.tree.children, self.distributions, strict=True))
        distributions = tuple(drawn_from.get(row) for row in tree.children)
        together = torch.cat([self.tokens, numbers_to(self.tokens.device, tokens)])
        # What drafting computed lacks the last token that was drafted, and these.
        return Draft(together, tree, distributions, self.token_ids)

    def __len__(self) -> int:
        return len(self.tokens)


class Sampler(Protocol):
    """Chooses tokens for plain decoding and for drafts, and accepts drafted tokens.

    One sampler serves one generation and sees all of it in order: a token is drawn after the prompt; each round then
    drafts some, or none, and verifies them.
    """

    def draw(self, logits: Tensor) -> Draw:
        """Choose a token by the target model's logits, ``[vocab_size]``."""

    def draft(self, step: DraftStep, token_ids: Tensor | None, count: int = 1, *, path: Tensor | None = None) -> Draw:
        """Choose tokens to propose for one place.

        Args:
            step: The draft step before it.
            token_ids: ``[n]``, the draft vocabulary; None is the whole one.
            count: How many different ones, best first.
            path: ``[d]``, the drafted tokens before the place; None where each place of the draft follows the first
                token of the one before.
        """

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        """Check ``k`` drafted tokens against the target model's logits, ``[k + 1, vocab_size]``."""


class GreedySampler:
    """Always the likeliest token."""

    def draw(self, logits: Tensor) -> Draw:
        return Draw(highest(logits[None]), None)

    def draft(self, step: DraftStep, token_ids: Tensor | None, count: int = 1, *, path: Tensor | None = None) -> Draw:
        if count == 1:
            return Draw(step.likeliest, None)
        columns = step.logits.topk(min(count, len(step.logits))).indices
        return Draw(columns if token_ids is None else token_ids[columns], None)

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        return greedy_match(draft.tree, draft.tokens, logits)


class RandomSampler:
    """Draws from the distribution that is left by warpers, such as temperature, top-k and top-p.

    Args:
        warpers: Applied in turn to logits ``[n, vocab_size]``; they look at each row alone, and not at the text.
        generator: Source of randomness, where logits will be.
    """

    def __init__(self, warpers: LogitsProcessorList, generator: torch.Generator) -> None:
        self._warpers = warpers
        self._generator = generator

    def distributions(self, logits: Tensor) -> Tensor:
        """Probabilities to sample from, for logits of shape ``[n, vocab_size]``."""
        no_ids = logits.new_empty((len(logits), 0), dtype=torch.long)  # these warpers look at the scores alone
        scores: Tensor = self._warpers(no_ids, logits)  # type: ignore[arg-type]
        return scores.softmax(-1)

    def draw(self, logits: Tensor) -> Draw:
        draw = self._draw(logits, 1)
        assert draw.distribution is not None
        return Draw(torch.where(draw.distribution[draw.tokens].isnan(), NOT_A_NUMBER, draw.tokens), draw.distribution)

    def draft(self, step: DraftStep, token_ids: Tensor | None, count: int = 1, *, path: Tensor | None = None) -> Draw:
        draw = self._draw(step.logits, min(count, len(step.logits)))
        return draw if token_ids is None else Draw(token_ids[draw.tokens], draw.distribution)

    def _draw(self, logits: Tensor, count: int) -> Draw:
        distribution = self.distributions(logits[None])[0]
        return Draw(sample(distribution, self._generator, count), distribution)

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        target = self.distributions(logits)
        drawn = {row: q for row, q in enumerate(draft.distributions) if q is not None}
        if not drawn:
            q = target.new_full((len(draft.distributions), target.shape[1]), torch.nan)
        else:
            q = torch.stack(list(drawn.values()))
            if draft.token_ids is not None:  # every other token has draft probability 0
                q = torch.zeros_like(target[: len(q)]).index_copy_(1, draft.token_ids, q)
            if len(q) < len(draft.distributions):
                certain = q.new_full((len(draft.distributions), q.shape[1]), torch.nan)
                q = certain.index_copy_(0, numbers_on(tuple(drawn), q.device), q)
        return speculative_sampling(draft.tree, draft.tokens, q, target, self._generator)
