"""Training draft layers, bridges and draft heads: AdamW on batches of whole texts, stopped early on held-out texts."""

from __future__ import annotations

import io
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError, first_line
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from layerskip.target_texts import TargetText
from layerskip.training.data import TrainingTexts
from layerskip.training.evaluation import LOSSES, Agreement, Loss, Scorer, frozen
from layerskip.training.trainable_draft import TrainableDraft
from layerskip.utils import cache_write_errors, digest, write_bytes_atomically

logger = logging.getLogger(__name__)

# The learning rate that suits a hidden size of this; it falls with the root of the size.
_RATE, _RATE_SIZE = 2e-3, 576
_BETAS = (0.9, 0.95)
_WARM_UP = 0.05
_LARGEST_GRADIENT = 1.0
# Evaluations in a whole training; it ends after so many in a row without an improvement.
_EVALUATIONS = 16
_PATIENCE = 3
_HELD_OUT_POSITIONS = 4096


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Args:
        loss: ``kl``, ``ce`` or ``both``; see :class:`Scorer`.
        epochs: How often each text is learned from, at most.
        minutes: Most minutes; the learning rate falls to nothing by then. None has no limit.
        batch_positions: Positions of a batch of whole texts, about.
        learning_rate: The highest one; None chooses by the hidden size.
        weight_decay: Of AdamW.
        seed: Decides the order of texts.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    loss: Loss = "kl"
    epochs: int = 8
    minutes: float | None = None
    batch_positions: int = 512
    learning_rate: float | None = None
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidInputError(f"loss '{self.loss}' is unknown; expected {', '.join(LOSSES)}")
        for name in ("epochs", "batch_positions"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.minutes is not None and not self.minutes > 0:
            raise InvalidInputError(f"minutes: expected a number above 0, got {self.minutes}")


@dataclass(frozen=True)
class EvalResult:
    """An evaluation on the held-out texts.

    Args:
        progress: Part of the training that is done, from 0 to 1.
        seconds: Time since it began, earlier runs included.
        agreement: How the draft does.
        best: Whether it never did better.
    """

    progress: float
    seconds: float
    agreement: Agreement
    best: bool

    @property
    def seconds_left(self) -> float | None:
        """Time to the end at the pace so far, unless training stops early."""
        return self.seconds * (1 - self.progress) / self.progress if self.progress else None


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Args:
        weights: The draft's weights as they were at the best evaluation, with the draft vocabulary.
        agreement: How the draft does on held-out texts.
        evaluations: All evaluations of this run, the first one before its first step.
        interrupted: Whether Ctrl-C ended it.
    """

    weights: DraftWeights
    agreement: Agreement
    evaluations: Sequence[EvalResult]
    interrupted: bool


def train(
    model: LayerSkipModel,
    draft: TrainableDraft,
    texts: TrainingTexts,
    settings: TrainingSettings,
    *,
    token_ids: Tensor | None = None,
    folder: Path | None = None,
    observe: Callable[[EvalResult], None] = lambda evaluation: None,
) -> Trained:
    """Train a draft layer or a bridge above an early exit, or draft heads; the model's own weights stay as they are.

    Args:
        model: The target model.
        draft: What to train, in place.
        texts: What the target model wrote.
        settings: How to train.
        token_ids: ``[n]``, the draft vocabulary; None for the whole one.
        folder: Where checkpoints are written, so that the same call resumes where an earlier one stopped; None writes
            none.
        observe: Called after every evaluation.

    Raises:
        InvalidInputError: There are too few texts.
        OSError: A checkpoint cannot be written.
    """
    with frozen(model):
        training = _Training(model, draft, texts, settings, token_ids, folder, observe)
        interrupted = False
        try:
            training.run()
        except KeyboardInterrupt:
            interrupted = True
        agreement = training.take_best()
    weights = draft.weights.requires_grad_(False)
    weights.token_ids = token_ids
    return Trained(weights, agreement, training.evaluations, interrupted)


@dataclass
class _State:
    """How far a training has come.

    Attributes:
        best: The weights' values at the best evaluation.
        best_loss: The loss on held-out texts then.
        misses: Evaluations in a row that were not better.
        epoch: Epochs done.
        batch: Batches done in the epoch after them.
        positions: Positions learned from, in all epochs.
        seconds: Time spent.
    """

    best: dict[str, Tensor]
    best_loss: float = math.inf
    misses: int = 0
    epoch: int = 0
    batch: int = 0
    positions: int = 0
    seconds: float = 0.0


class _Training:
    """A training in progress: weights, optimizer, and how far it has come."""

    def __init__(
        self,
        model: LayerSkipModel,
        draft: TrainableDraft,
        texts: TrainingTexts,
        settings: TrainingSettings,
        token_ids: Tensor | None,
        folder: Path | None,
        observe: Callable[[EvalResult], None],
    ) -> None:
        self._draft = draft
        self._texts = texts
        self._settings = settings
        self._observe = observe
        self._scorer = Scorer(model, model.stack_of(SkipSet(model.num_layers), token_ids=token_ids), settings.loss)
        self._held_out = _batches(texts.held_out(_HELD_OUT_POSITIONS), settings.batch_positions)
        self._rate = settings.learning_rate or _RATE * math.sqrt(_RATE_SIZE / model.config.hidden_size)
        self._optimizer = torch.optim.AdamW(
            draft.weights.parameters(), lr=self._rate, betas=_BETAS, weight_decay=settings.weight_decay
        )
        learned = sum(len(text.choices) for text in texts.learned())
        if not learned:
            raise InvalidInputError("prompts: there are too few different ones to learn from; give more")
        self._all_positions = settings.epochs * learned
        self.evaluations: list[EvalResult] = []
        self.state = _State(self._values())
        self._checkpoint = None if folder is None else folder / f"training-{self._digest(token_ids)}.pt"
        self._resume()
        self._began = time.monotonic() - self.state.seconds

    def _values(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._draft.weights.state_dict().items()}

    def _digest(self, token_ids: Tensor | None) -> str:
        """Changes with whatever would make it another training."""
        ids = None if token_ids is None else token_ids.tolist()
        # Rounded: the last places of a sum depend on the number of threads.
        first = {
            name: [list(value.shape), f"{value.double().abs().sum():.5e}"]
            for name, value in self._draft.weights.state_dict().items()
        }
        texts = [self._texts.shards, self._texts.positions]
        return digest([asdict(self._settings), ids, list(self._draft.weights.steps), first, texts])

    def _resume(self) -> None:
        """Continue from the checkpoint, if there is one and it is whole; else begin anew."""
        if self._checkpoint is None or not self._checkpoint.is_file():
            return
        untrained = self._optimizer.state_dict()
        try:
            saved = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
            state = _State(**saved["state"])
            self._draft.weights.load_state_dict(state.best)  # checked here, or it would fail after the training
            self._draft.weights.load_state_dict(saved["weights"])
            self._optimizer.load_state_dict(saved["optimizer"])
        except Exception as error:  # of a damaged file torch raises whatever its bytes happen to lead to
            logger.warning(
                "%s: not a whole checkpoint (%s); the training begins anew", self._checkpoint, first_line(error)
            )
            self._draft.weights.load_state_dict(self.state.best)
            self._optimizer.load_state_dict(untrained)
        else:
            self.state = state

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        content = io.BytesIO()
        saved = {"weights": self._values(), "optimizer": self._optimizer.state_dict(), "state": vars(self.state)}
        torch.save(saved, content)
        with cache_write_errors(self._checkpoint, "the training"):
            write_bytes_atomically(self._checkpoint, content.getvalue())

    def run(self) -> None:
        """Train until the end, the time limit, or no more improvement."""
        self._evaluate()
        next_evaluation = min(self._progress() + 1 / _EVALUATIONS, 1.0)
        while not self._ended():
            for batch in self._rest_of_epoch():
                self._step(batch)
                if self._progress() >= next_evaluation:
                    self._evaluate()
                    next_evaluation = min(self._progress() + 1 / _EVALUATIONS, 1.0)
                    if self._ended():
                        return
            self.state.epoch, self.state.batch = self.state.epoch + 1, 0

    def _ended(self) -> bool:
        return self._progress() >= 1 or self.state.misses >= _PATIENCE

    def take_best(self) -> Agreement:
        """Restore the weights of the best evaluation, and evaluate them."""
        self._draft.weights.load_state_dict(self.state.best)
        return self._scorer.agreement(self._draft, self._held_out)

    def _rest_of_epoch(self) -> Iterator[list[TargetText]]:
        """The batches of the current epoch after those that were done."""
        order = random.Random(f"{self._settings.seed} {self.state.epoch}")
        done = self.state.batch
        for shard in order.sample(self._texts.shards, len(self._texts.shards)):
            texts = list(self._texts.learned([shard]))
            order.shuffle(texts)
            for batch in _batches(texts, self._settings.batch_positions):
                if done:
                    done -= 1
                    continue
                yield batch

    def _step(self, batch: Sequence[TargetText]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * _schedule(self._progress())
        self._optimizer.zero_grad()
        self._scorer.learn_from(self._draft, batch)
        torch.nn.utils.clip_grad_norm_(self._draft.weights.parameters(), _LARGEST_GRADIENT)
        self._optimizer.step()
        self.state.batch += 1
        self.state.positions += sum(len(text.choices) for text in batch)

    def _progress(self) -> float:
        """By the texts or by the time, whichever ends first."""
        by_texts = self.state.positions / self._all_positions
        by_time = (time.monotonic() - self._began) / (60 * self._settings.minutes) if self._settings.minutes else 0.0
        return min(max(by_texts, by_time), 1.0)

    def _evaluate(self) -> None:
        agreement = self._scorer.agreement(self._draft, self._held_out)
        state = self.state
        better = agreement.loss < state.best_loss
        if better:
            state.best, state.best_loss, state.misses = self._values(), agreement.loss, 0
        elif self.evaluations:  # the first evaluation of a resumed run repeats the last one's
            state.misses += 1
        state.seconds = time.monotonic() - self._began
        self.evaluations.append(EvalResult(self._progress(), state.seconds, agreement, better))
        self._save()
        self._observe(self.evaluations[-1])


def _schedule(progress: float) -> float:
    """The share of the highest learning rate: a linear warm-up, then a cosine to nothing."""
    if progress < _WARM_UP:
        return (progress + 0.1 * _WARM_UP) / (1.1 * _WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def _batches(texts: Sequence[TargetText], positions: int) -> list[list[TargetText]]:
    """Texts in order, in batches of about so many positions at which a draft is asked."""
    batches: list[list[TargetText]] = []
    room = 0
    for text in texts:
        if room <= 0:
            batches.append([])
            room = positions
        batches[-1].append(text)
        room -= len(text.choices)
    return batches
