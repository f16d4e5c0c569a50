"""How a next token is chosen, and how a draft's choices are checked against the full model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from layerskip.decoding.verification import Verdict, greedy_match, sample, speculative_sampling
from layerskip.engine import DraftStep, SharedPrefix
from layerskip.errors import InvalidInputError
from layerskip.stack.tree import Tree


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; the default is greedy.

    Args:
        temperature: 0 always takes the likeliest token; above, logits are divided by it before sampling.
        top_k: Sample among this many likeliest tokens; 0 for all.
        top_p: Sample among the likeliest tokens that together have this probability, in ``(0, 1]``; 1 for all.
        seed: Makes sampling repeatable, in ``[0, 2**64)``; None draws a new seed each time.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
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
        if self.temperature == 0:
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


class SamplingRule(Protocol):
    """How to choose tokens: :class:`Sampling`, or rules that look at the text."""

    def sampler(self, device: torch.device) -> Sampler:
        """A fresh sampler for one generation, for logits on this device."""


@dataclass(frozen=True)
class Draw:
    """Chosen tokens for one place in the text, and what they were drawn from.

    Args:
        tokens: ``[b]``, their ids, drawn in turn without replacement; a draft goes on behind the first.
        distribution: ``[n]``, the probabilities that they were drawn from, one for each token that was scored; None
            where nothing was drawn.
    """

    tokens: Tensor
    distribution: Tensor | None


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for the text to go on with.

    Args:
        tokens: ``[k]``, their ids; k may be 0.
        tree: Which of them follows which.
        distributions: For each row of the tree that others follow, in order, the distribution that they were drawn
            from, ``[vocab_size]``, or a probability for each of ``token_ids``; None under greedy choice.
        token_ids: ``[n]``, the draft vocabulary; None for the whole one.
        shared: What drafting already computed of the full model's pass, if anything.
    """

    tokens: Tensor
    tree: Tree
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
        """The draft of some draws, each behind the first token of the one before: a chain with leaves."""
        chain, leaves = [d.tokens[:1] for d in draws], [d.tokens[1:] for d in draws]
        tokens = torch.cat([*chain, *leaves]) if draws else torch.empty(0, dtype=torch.long, device=device)
        tree = Tree.comb(len(d.tokens) for d in draws)
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
            widths: As in :meth:`Tree.grown`.
            device: Where the tokens are.
            token_ids: As in the class.
        """
        tokens = torch.cat([d.tokens for d in draws]) if draws else torch.empty(0, dtype=torch.long, device=device)
        return cls(tokens, Tree.grown(widths), tuple(d.distribution for d in draws), token_ids)

    def __len__(self) -> int:
        return len(self.tokens)


class Sampler(Protocol):
    """Chooses tokens for plain decoding and for drafts, and decides which drafted tokens stand.

    One sampler serves one generation and sees all of it in order: one token is drawn behind the prompt; each round
    then drafts some, or none, and verifies them.
    """

    def draw(self, logits: Tensor) -> Draw:
        """Choose a token by the full model's logits, ``[vocab_size]``."""

    def draft(self, step: DraftStep, token_ids: Tensor | None, count: int = 1, *, behind: Tensor | None = None) -> Draw:
        """Choose tokens to propose for one place.

        Args:
            step: The draft step before it.
            token_ids: ``[n]``, the draft vocabulary; None is the whole one.
            count: How many different ones, best first.
            behind: ``[d]``, the drafted tokens on the way to the place; None where each place of the draft is behind
                the first token of the one before.
        """

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        """Check ``k`` drafted tokens against the full model's logits, ``[k + 1, vocab_size]``."""


class GreedySampler:
    """Always the likeliest token."""

    def draw(self, logits: Tensor) -> Draw:
        return Draw(logits.argmax(-1, keepdim=True), None)

    def draft(self, step: DraftStep, token_ids: Tensor | None, count: int = 1, *, behind: Tensor | None = None) -> Draw:
        if count == 1:
            return Draw(step.likeliest, None)
        columns = step.logits.topk(min(count, len(step.logits))).indices
        return Draw(columns if token_ids is None else token_ids[columns], None)

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        return greedy_match(draft.tree, draft.tokens, logits)


class RandomSampler:
    """Draws from the distribution that warpers leave, such as temperature, top-k and top-p.

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
        return self._draw(logits, 1)

    def draft(self, step: DraftStep, token_ids: Tensor | None, count: int = 1, *, behind: Tensor | None = None) -> Draw:
        draw = self._draw(step.logits, min(count, len(step.logits)))
        return draw if token_ids is None else Draw(token_ids[draw.tokens], draw.distribution)

    def _draw(self, logits: Tensor, count: int) -> Draw:
        distribution = self.distributions(logits[None])[0]
        return Draw(sample(distribution, self._generator, count), distribution)

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        target = self.distributions(logits)
        drawn_from = [row for row in draft.distributions if row is not None]
        q = torch.stack(drawn_from) if drawn_from else target[:0]
        if draft.token_ids is not None and drawn_from:  # every other token has draft probability 0
            q = torch.zeros_like(target[: len(q)]).index_copy_(1, draft.token_ids, q)
        return speculative_sampling(draft.tree, draft.tokens, q, target, self._generator)
