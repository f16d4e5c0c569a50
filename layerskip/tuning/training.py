"""Training stand-ins and draft heads: AdamW on batches of whole texts, stopped when held-out texts gain no more."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from layerskip.drafts.assets import DraftAssets
from layerskip.errors import InvalidInputError
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from layerskip.tuning.checkpoint import TrainingState, read_state, write_state
from layerskip.tuning.data import Shards, TuningText
from layerskip.tuning.learners import Learner
from layerskip.tuning.scoring import LOSSES, Agreement, Loss, Scorer, frozen

# The rate of AdamW that suits a hidden size of this; it falls with the root of the size.
_RATE, _RATE_SIZE = 2e-3, 576
_BETAS = (0.9, 0.95)
_WARM_UP = 0.05
_LARGEST_GRADIENT = 1.0
# Held-out texts are looked at so often in a whole training, and it ends when so many looks in a row gained nothing.
_LOOKS = 16
_PATIENCE = 3
_HELD_OUT_POSITIONS = 4096


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Args:
        loss: ``kl``, ``ce`` or ``both``; see :class:`Scorer`.
        epochs: How often each text is learned from, at most.
        minutes: Most minutes; the learning rate falls to nothing by then. None has no limit.
        batch_positions: Positions asked in a batch of whole texts, about.
        learning_rate: The highest one; None takes one by the hidden size.
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
class Look:
    """A look at the held-out texts.

    Args:
        progress: Part of the training that is done, from 0 to 1.
        seconds: Since it began, those of earlier runs included.
        agreement: How the stand-in does.
        best: Whether it never did better.
    """

    progress: float
    seconds: float
    agreement: Agreement
    best: bool

    @property
    def seconds_left(self) -> float | None:
        """Till the end if it is not stopped earlier, by the pace so far."""
        return self.seconds * (1 - self.progress) / self.progress if self.progress else None


@dataclass(frozen=True)
class Trained:
    """What training came to.

    Args:
        assets: What was trained as it was at the best look, with the draft vocabulary.
        agreement: How it does on held-out texts.
        looks: All looks of this run, the one before its first step among them.
        interrupted: Whether Ctrl-C ended it.
    """

    assets: DraftAssets
    agreement: Agreement
    looks: Sequence[Look]
    interrupted: bool


def train(
    model: LayerSkipModel,
    learner: Learner,
    shards: Shards,
    settings: TrainingSettings,
    *,
    token_ids: Tensor | None = None,
    folder: Path | None = None,
    observe: Callable[[Look], None] = lambda look: None,
) -> Trained:
    """Train a stand-in for everything above an exit, or draft heads; the model's own weights stay as they are.

    Args:
        model: The full model.
        learner: What to train; what it stands for ends at the top of the stack.
        shards: What the full model wrote.
        settings: How to train.
        token_ids: ``[n]``, the draft vocabulary; None for the whole one.
        folder: Where the training is kept, so that the same call goes on where an earlier one stopped; None keeps
            nothing.
        observe: Told of every look at the held-out texts.

    Raises:
        InvalidInputError: The run does not end at the top, or there are too few texts.
        OSError: The training cannot be kept.
    """
    if learner.stop != len(model.sublayers):
        raise InvalidInputError(
            f"stand-in: ends before sublayer {learner.stop}; only one that reaches the top can be trained"
        )
    with frozen(model):
        training = _Training(model, learner, shards, settings, token_ids, folder, observe)
        interrupted = False
        try:
            training.run()
        except KeyboardInterrupt:
            interrupted = True
        agreement = training.take_best()
    assets = replace(learner.assets(training.state.best), token_ids=token_ids)
    return Trained(assets, agreement, training.looks, interrupted)


class _Training:
    """The state of one training."""

    def __init__(
        self,
        model: LayerSkipModel,
        learner: Learner,
        shards: Shards,
        settings: TrainingSettings,
        token_ids: Tensor | None,
        folder: Path | None,
        observe: Callable[[Look], None],
    ) -> None:
        self._learner = learner
        self._shards = shards
        self._settings = settings
        self._observe = observe
        self._scorer = Scorer(model, model.stack_of(SkipSet(model.num_layers), token_ids=token_ids), settings.loss)
        self._held_out = _batches(shards.held_out(_HELD_OUT_POSITIONS), settings.batch_positions)
        rate = settings.learning_rate or _RATE * math.sqrt(_RATE_SIZE / model.config.hidden_size)
        self._rate = rate
        self._optimizer = torch.optim.AdamW(
            learner.parameters.values(), lr=rate, betas=_BETAS, weight_decay=settings.weight_decay
        )
        learned = sum(int(text.asked.sum()) for text in shards.learned(shards.paths))
        if not learned:
            raise InvalidInputError("prompts: there are too few different ones to learn from; give more")
        self._all_positions = settings.epochs * learned
        self._path = None if folder is None else folder / f"training-{self._digest(token_ids)}.safetensors"
        self.looks: list[Look] = []
        self.state = TrainingState.fresh(learner.parameters)
        if self._path is not None:
            kept = read_state(self._path, self.state)
            if kept is not None:
                self.state = kept
                kept.put_into(learner.parameters, self._optimizer)
        self._began = time.monotonic() - self.state.seconds

    def _digest(self, token_ids: Tensor | None) -> str:
        """Changes with whatever would make it another training."""
        ids = None if token_ids is None else token_ids.tolist()
        shapes = sorted((name, list(value.shape)) for name, value in self._learner.parameters.items())
        run = [self._learner.start, self._learner.stop, shapes]
        # Rounded: the last places of a sum depend on the number of threads.
        first = [f"{value.detach().double().abs().sum():.5e}" for value in self._learner.parameters.values()]
        texts = [[path.name for path in self._shards.paths], self._shards.positions]
        what = json.dumps([asdict(self._settings), ids, run, first, texts])
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def run(self) -> None:
        """Train from where the state is until the end, the time limit, or no more gain."""
        if not self.looks:
            self._look()
        next_look = self._progress() + 1 / _LOOKS
        while self._progress() < 1 and self.state.misses < _PATIENCE:
            for batch in self._rest_of_epoch():
                self._step(batch)
                if self._progress() >= next_look or self._progress() >= 1:
                    self._look()
                    next_look = self._progress() + 1 / _LOOKS
                    if self._progress() >= 1 or self.state.misses >= _PATIENCE:
                        return
            self.state.epoch, self.state.batch = self.state.epoch + 1, 0

    def take_best(self) -> Agreement:
        """Give the parameters the values of the best look; how they do."""
        for name, parameter in self._learner.parameters.items():
            parameter.data.copy_(self.state.best[name])
        return self._scorer.agreement(self._learner, self._held_out)

    def _rest_of_epoch(self) -> Iterator[list[TuningText]]:
        """The batches of the epoch that it is in, behind those that were done."""
        chance = random.Random(f"{self._settings.seed} {self.state.epoch}")
        paths = chance.sample(list(self._shards.paths), len(self._shards.paths))
        done = self.state.batch
        for path in paths:
            texts = list(self._shards.learned([path]))
            chance.shuffle(texts)
            for batch in _batches(texts, self._settings.batch_positions):
                if done:
                    done -= 1
                    continue
                yield batch

    def _step(self, batch: Sequence[TuningText]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * _schedule(self._progress())
        self._optimizer.zero_grad()
        self._scorer.learn_from(self._learner, batch)
        torch.nn.utils.clip_grad_norm_(self._learner.parameters.values(), _LARGEST_GRADIENT)
        self._optimizer.step()
        self.state.batch += 1
        self.state.positions += sum(int(text.asked.sum()) for text in batch)

    def _progress(self) -> float:
        """By the texts or by the time, whichever ends first."""
        by_texts = self.state.positions / self._all_positions
        by_time = (time.monotonic() - self._began) / (60 * self._settings.minutes) if self._settings.minutes else 0.0
        return min(max(by_texts, by_time), 1.0)

    def _look(self) -> None:
        agreement = self._scorer.agreement(self._learner, self._held_out)
        state = self.state
        better = agreement.loss < state.best_loss
        if better:
            state.best_loss, state.misses = agreement.loss, 0
            state.best = {name: value.detach().clone() for name, value in self._learner.parameters.items()}
        elif self.looks:  # the first look of a run that goes on sees what the last one saw
            state.misses += 1
        state.seconds = time.monotonic() - self._began
        self.looks.append(Look(self._progress(), state.seconds, agreement, better))
        if self._path is not None:
            write_state(self._path, state, self._learner.parameters, self._optimizer)
        self._observe(self.looks[-1])


def _schedule(progress: float) -> float:
    """The share of the highest learning rate: it rises at first, then falls as a cosine to nothing."""
    if progress < _WARM_UP:
        return (progress + 0.1 * _WARM_UP) / (1.1 * _WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def _batches(texts: Sequence[TuningText], positions: int) -> list[list[TuningText]]:
    """Texts in order, in batches of about so many asked positions."""
    batches: list[list[TuningText]] = []
    room = 0
    for text in texts:
        if room <= 0:
            batches.append([])
            room = positions
        batches[-1].append(text)
        room -= int(text.asked.sum())
    return batches
