"""How a stand-in does on some texts: its loss, and how often the full model's choice is among its best tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from layerskip.stack.kv_cache import KVCache
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.stack import Stack
from layerskip.tuning.data import TuningText
from layerskip.tuning.learners import Learner

Loss = Literal["kl", "ce", "both"]
LOSSES: tuple[Loss, ...] = ("kl", "ce", "both")
# Agreement is told for so many best tokens: what a chain gets, and what candidates side by side could.
RANKS = (1, 2, 4, 8)
# Scores held at a time.
_SCORES = 2**24
_IGNORED = -100  # functional.cross_entropy's own


@dataclass(frozen=True)
class Agreement:
    """How a draft does where it would be asked.

    Args:
        positions: How many of them.
        loss: The mean of what training minimizes.
        coverage: Share of the full model's choices that are in the draft vocabulary.
        top: Share of positions at which the full model's choice is among the draft's best ``k`` tokens, by ``k``.
    """

    positions: int
    loss: float
    coverage: float
    top: Mapping[int, float]


class Scorer:
    """Scores stand-ins that reach to the top of the stack on batches of whole texts.

    A text is taken as a whole, with a causal mask, so that a layer's attention sees its own keys of all positions
    before, as in decoding.

    Args:
        model: The full model, whose weights must not ask for gradients.
        stack: A stack of it with the draft vocabulary.
        loss: ``kl``: Kullback-Leibler divergence of the draft from the full model, both over the draft vocabulary;
            ``ce``: cross entropy of the full model's choice, where the vocabulary has it; ``both``: their sum.
    """

    def __init__(self, model: LayerSkipModel, stack: Stack, loss: Loss) -> None:
        self._model = model
        self._stack = stack
        self._loss = loss
        ids = torch.arange(model.vocab_size) if stack.token_ids is None else stack.token_ids.cpu()
        self._columns = torch.full((model.vocab_size,), _IGNORED)
        self._columns[ids] = torch.arange(len(ids))
        self._chunk = max(_SCORES // len(ids), 1)

    def learn_from(self, learner: Learner, texts: Sequence[TuningText]) -> float:
        """Add the gradient of the mean loss over all asked positions to the learner's parameters; return that loss."""
        states, after, choices = self._states(learner, texts)
        # Chunk by chunk through the head, so that the scores of one chunk are in memory at a time.
        leaf = states.detach().requires_grad_()
        total = 0.0
        for part, target, columns in self._chunks(leaf, after, choices):
            loss = self._losses(self._scores(part), self._targets(target), columns).sum() / len(choices)
            loss.backward()
            total += float(loss.detach())
        states.backward(leaf.grad)
        return total

    @torch.no_grad()
    def agreement(self, learner: Learner, batches: Sequence[Sequence[TuningText]]) -> Agreement:
        """How a learner does on some batches of texts."""
        total, loss, covered = 0, 0.0, 0
        within = dict.fromkeys(RANKS, 0)
        for texts in batches:
            for part, target, columns in self._chunks(*self._states(learner, texts)):
                scores = self._scores(part)
                loss += float(self._losses(scores, self._targets(target), columns).sum())
                known = columns != _IGNORED
                own = scores.gather(-1, columns.clamp(min=0)[:, None])
                rank = (scores > own).sum(-1)
                total, covered = total + len(columns), covered + int(known.sum())
                for k in RANKS:
                    within[k] += int((known & (rank < k)).sum())
        return Agreement(total, loss / total, covered / total, {k: count / total for k, count in within.items()})

    def _states(self, learner: Learner, texts: Sequence[TuningText]) -> tuple[Tensor, Tensor, Tensor]:
        """At all asked positions: the draft's last states and the full model's, ``[p, hidden_size]``; choices."""
        device = self._model.device
        longest = max(len(text.tokens) for text in texts)
        before = torch.stack([functional.pad(t.before, (0, 0, 0, longest - len(t.tokens))) for t in texts])
        asked = torch.stack([functional.pad(text.asked, (0, longest - len(text.tokens))) for text in texts])
        context = self._model.pass_context(longest, _Forgetful())
        with self._precision():
            states = learner.step(before.to(device, torch.float32), context)  # [b, longest, hidden_size]
        after = torch.cat([text.after[text.asked] for text in texts])
        choices = torch.cat([text.choices[text.asked] for text in texts]).long()
        return states[asked.to(device)], after.to(device), choices

    def _chunks(self, states: Tensor, after: Tensor, choices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        columns = self._columns[choices].to(states.device)
        return zip(*(part.split(self._chunk) for part in (states, after, columns)), strict=True)

    def _scores(self, states: Tensor) -> Tensor:
        with self._precision():
            return self._model.logits(states[None], self._stack)

    @torch.no_grad()
    def _targets(self, after: Tensor) -> Tensor:
        return self._scores(after.to(self._model.dtype))

    def _losses(self, scores: Tensor, target: Tensor, columns: Tensor) -> Tensor:
        """Of each position, ``[p]``."""
        losses = scores.new_zeros(len(scores))
        if self._loss != "ce":
            wanted = target.log_softmax(-1)
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


class _Forgetful(KVCache):
    """For passes over whole texts: keys and values are those of the pass alone, for any number of texts."""

    def __init__(self) -> None:
        super().__init__(num_layers=0, capacity=0)

    def reserve(self, positions: int) -> None:
        pass

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return keys, values


@contextmanager
def frozen(model: LayerSkipModel) -> Iterator[None]:
    """Let no weight of the model ask for a gradient meanwhile."""
    asking = [weight for weight in model.hf_model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)
