"""The loss of a trained draft on texts, how often it agrees with the target model, and its ideal speedup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.heads import DraftHeads
from layerskip.model import LayerSkipModel
from layerskip.sublayers import Stack, weights_of
from layerskip.target_texts import TargetText
from layerskip.training.trainable_draft import DraftOutput, TrainableDraft

Loss = Literal["kl", "ce", "both"]
LOSSES: tuple[Loss, ...] = ("kl", "ce", "both")
# Agreement is counted for so many best tokens: what a chain gets, and what the siblings of a token tree could.
RANKS = (1, 2, 4, 8)
# Scores in memory at a time.
_SCORES = 2**24
_IGNORED = -100  # functional.cross_entropy's own


@dataclass(frozen=True)
class Agreement:
    """How often a draft agrees with the target model where it is asked.

    Args:
        positions: How many of them.
        loss: The mean of what training minimizes.
        coverage: Share of the target model's choices that are in the draft vocabulary.
        top: Share of positions at which the target model's choice is among the draft's best ``k`` tokens, by ``k``; of
            draft heads, those of the first.
        later: The same of the second head, the third and so on, each given the true tokens before its own; empty
            without heads.
    """

    positions: int
    loss: float
    coverage: float
    top: Mapping[int, float]
    later: tuple[Mapping[int, float], ...] = ()

    @property
    def by_place(self) -> tuple[Mapping[int, float], ...]:
        """``top`` and ``later``."""
        return (self.top, *self.later)


@dataclass
class _Count:
    """Counts for one place of drafts."""

    positions: int
    loss: float
    covered: int
    within: dict[int, int]

    @classmethod
    def empty(cls) -> _Count:
        return cls(0, 0.0, 0, dict.fromkeys(RANKS, 0))

    @property
    def top(self) -> dict[int, float]:
        return {k: count / max(self.positions, 1) for k, count in self.within.items()}


class Scorer:
    """Scores the outputs of drafts in training, over batches of whole texts.

    Args:
        model: The target model, with gradients disabled for its weights.
        stack: A stack of it with the draft vocabulary.
        loss: ``kl``: Kullback-Leibler divergence of the draft from the target model, both over the draft vocabulary;
            ``ce``: cross entropy of the target model's choice, where the vocabulary has it; ``both``: their sum.
    """

    def __init__(self, model: LayerSkipModel, stack: Stack, loss: Loss) -> None:
        self._model = model
        self._stack = stack
        self._loss = loss
        ids = torch.arange(model.vocab_size) if stack.token_ids is None else stack.token_ids.cpu()
        self._columns = torch.full((model.vocab_size,), _IGNORED)
        self._columns[ids] = torch.arange(len(ids))
        self._chunk = max(_SCORES // len(ids), 1)

    def learn_from(self, draft: TrainableDraft, texts: Sequence[TargetText]) -> float:
        """Add the gradient of the mean loss over all asked positions to the draft's weights; return that loss."""
        outputs = [output for output in self._outputs(draft, texts) if len(output.states)]
        # Chunk by chunk through the head, so that the scores of one chunk are in memory at a time.
        leaves = [output.states.detach().requires_grad_() for output in outputs]
        total = 0.0
        for output, leaf in zip(outputs, leaves, strict=True):
            share = output.weight / len(leaf)
            for part, target, columns in self._chunks(output, leaf):
                loss = share * self._losses(self._scores(part), target, columns).sum()
                loss.backward()
                total += float(loss.detach())
        torch.autograd.backward([output.states for output in outputs], [leaf.grad for leaf in leaves])
        return total

    @torch.no_grad()
    def agreement(self, draft: TrainableDraft, batches: Sequence[Sequence[TargetText]]) -> Agreement:
        """How often a draft agrees on some batches of texts."""
        counts: list[_Count] = []
        for texts in batches:
            outputs = self._outputs(draft, texts)
            counts = counts or [_Count.empty() for _ in outputs]
            for count, output in zip(counts, outputs, strict=True):
                self._add(count, output)
        first, *later = counts
        loss = sum(count.loss / max(count.positions, 1) for count in counts)
        share = first.covered / max(first.positions, 1)
        return Agreement(first.positions, loss, share, first.top, tuple(count.top for count in later))

    def _add(self, count: _Count, output: DraftOutput) -> None:
        for part, target, columns in self._chunks(output, output.states):
            scores = self._scores(part)
            known = columns != _IGNORED
            own = scores.gather(-1, columns.clamp(min=0)[:, None])
            rank = (scores > own).sum(-1)
            count.loss += output.weight * float(self._losses(scores, target, columns).sum())
            count.positions += len(columns)
            count.covered += int(known.sum())
            for k in RANKS:
                count.within[k] += int((known & (rank < k)).sum())

    def _outputs(self, draft: TrainableDraft, texts: Sequence[TargetText]) -> list[DraftOutput]:
        with self._precision():
            return draft.outputs(texts)

    def _chunks(self, output: DraftOutput, states: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        columns = self._columns[output.choices].to(states.device)
        return zip(*(part.split(self._chunk) for part in (states, output.after, columns)), strict=True)

    def _scores(self, states: Tensor) -> Tensor:
        with self._precision():
            return self._model.logits(states[None], self._stack)

    @torch.no_grad()
    def _targets(self, after: Tensor) -> Tensor:
        return self._scores(after.to(self._model.dtype))

    def _losses(self, scores: Tensor, after: Tensor, columns: Tensor) -> Tensor:
        """Of each position, ``[p]``; ``after``, ``[p, hidden_size]``, are the target model's states there."""
        losses = scores.new_zeros(len(scores))
        if self._loss != "ce":
            wanted = self._targets(after).log_softmax(-1)
            losses = losses + functional.kl_div(scores.log_softmax(-1), wanted, log_target=True, reduction="none").sum(
                -1
            )
        if self._loss != "kl":
            losses = losses + functional.cross_entropy(scores, columns, ignore_index=_IGNORED, reduction="none")
        return losses

    def _precision(self) -> torch.autocast:
        device = self._model.device.type
        mixed = device == "cuda" or self._model.dtype != torch.float32
        return torch.autocast(device, dtype=torch.bfloat16, enabled=mixed)


@contextmanager
def frozen(model: LayerSkipModel) -> Iterator[None]:
    """Disable gradients for the model's weights inside the block."""
    trainable = [weight for weight in model.hf_model.parameters() if weight.requires_grad]
    for weight in trainable:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)


LONGEST = 16


def ideal_speedup(top: Sequence[Mapping[int, float]], costs: Sequence[float]) -> float:
    """The speedup of the best draft of a fixed length and number of branches, if verifying costs one plain step.

    A place of a draft is accepted by any of its branches, but only the first one is drafted further.

    Args:
        top: For each place of a draft how often the target's choice is among the best ``k`` tokens there if the first
            tokens of the places before were accepted, by ``k``.
        costs: Of drafts of one place, of two and so on, in plain decoding steps.
    """
    best, tokens, accepted = 0.0, 1.0, 1.0
    for within, cost in zip(top, costs, strict=True):
        tokens += accepted * max(within.values())
        accepted *= within[1]
        best = max(best, tokens / (1 + cost))
    return best


def step_cost_by_weights(model: LayerSkipModel, stack: Stack) -> float:
    """The cost of a draft step as the share of the target model's weights that it reads."""
    steps = sum(step.num_weights for _, step in stack.steps)
    return (steps + _scoring_weights(model, stack)) / _full_weights(model)


def head_costs_by_weights(
    model: LayerSkipModel, heads: DraftHeads, stack: Stack, prefix: DraftLayer | None = None
) -> list[float]:
    """The costs of drafts with one head, with two and so on, as shares of the target model's weights that they read.

    Args:
        model: The model.
        heads: The heads.
        stack: Any of the model's, with the draft vocabulary.
        prefix: The layer before the heads, which runs once a draft; None where there is none.
    """
    scoring, full = _scoring_weights(model, stack), _full_weights(model)
    first = 0 if prefix is None else prefix.num_weights
    return [(first + heads.weights_read(places, scoring)) / full for places in range(1, heads.count + 1)]


def _scoring_weights(model: LayerSkipModel, stack: Stack) -> int:
    return _head_weights(model) if stack.lm_head_rows is None else stack.lm_head_rows.numel()


def _full_weights(model: LayerSkipModel) -> int:
    return sum(sublayer.num_weights for sublayer in model.sublayers) + _head_weights(model)


def _head_weights(model: LayerSkipModel) -> int:
    head: nn.Module = model.hf_model.get_output_embeddings()
    return sum(weight.numel() for weight in weights_of(head))
