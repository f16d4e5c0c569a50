"""Training stand-ins and draft heads: AdamW on batches of whole texts, stopped when held-out texts gain no more."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from layerskip.target_texts import TargetText
from layerskip.training.data import TrainingTexts
from layerskip.training.evaluation import LOSSES, Agreement, Loss, Scorer, frozen
from layerskip.training.trainable_draft import TrainableDraft
from layerskip.utils import write_bytes_atomically

_COUNTERS = ("epoch", "batch", "positions", "seconds", "best_loss", "misses")


@dataclass
class TrainingState:
    """Where a training stands.

    Attributes:
        best: The parameters' values when held-out texts were predicted best.
        best_loss: The loss on held-out texts then.
        misses: Looks in a row that were not better.
        epoch: Epochs done.
        batch: Batches done in the epoch after them.
        positions: Positions learned from, in all epochs.
        seconds: Time spent.
        values: The parameters' values where it was read from disk; empty otherwise.
        moments: Those of AdamW, likewise.
    """

    best: dict[str, Tensor]
    best_loss: float
    misses: int
    epoch: int
    batch: int
    positions: int
    seconds: float
    values: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]

    @classmethod
    def fresh(cls, parameters: Mapping[str, nn.Parameter]) -> TrainingState:
        """Before the first step."""
        best = {name: value.detach().clone() for name, value in parameters.items()}
        return cls(best, float("inf"), 0, 0, 0, 0, 0.0, {}, {})

    def put_into(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Bring parameters and optimizer to where they were when it was written."""
        state = {}
        for number, (name, parameter) in enumerate(parameters.items()):
            parameter.data.copy_(self.values[name])
            moments = {key: self.moments[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in self.moments}
            if moments:
                state[number] = moments
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def write_state(
    path: Path, state: TrainingState, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write where a training stands, so that a killed process leaves the old state or the new one.

    Raises:
        OSError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {f"value.{name}": parameter for name, parameter in parameters.items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"moment.{key}.{name}": moments[key] for key in _MOMENTS if key in moments}
    counters = json.dumps({name: getattr(state, name) for name in _COUNTERS})
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes_atomically(path, save(content, metadata={"counters": counters}))


def read_state(path: Path, like: TrainingState) -> TrainingState | None:
    """Where a training stands; None if it is not there, not whole, or of other parameters.

    Args:
        path: The file.
        like: A fresh state of the same parameters.
    """
    try:
        with safe_open(path, "pt") as file:
            counters = json.loads(file.metadata()["counters"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    parts: dict[str, dict[str, Tensor]] = {"value": {}, "best": {}, "moment": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    if {name: value.shape for name, value in parts["value"].items()} != {n: v.shape for n, v in like.best.items()}:
        return None
    return TrainingState(**counters, best=parts["best"], values=parts["value"], moments=parts["moment"])


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
class EvalResult:
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

    assets: DraftWeights
    agreement: Agreement
    looks: Sequence[EvalResult]
    interrupted: bool


def train(
    model: LayerSkipModel,
    learner: TrainableDraft,
    texts: TrainingTexts,
    settings: TrainingSettings,
    *,
    token_ids: Tensor | None = None,
    folder: Path | None = None,
    observe: Callable[[EvalResult], None] = lambda look: None,
) -> Trained:
    """Train a stand-in for everything above an exit, or draft heads; the model's own weights stay as they are.

    Args:
        model: The target model.
        learner: What to train; what it stands for ends at the top of the stack.
        texts: What the target model wrote.
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
        training = _Training(model, learner, texts, settings, token_ids, folder, observe)
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
        learner: TrainableDraft,
        texts: TrainingTexts,
        settings: TrainingSettings,
        token_ids: Tensor | None,
        folder: Path | None,
        observe: Callable[[EvalResult], None],
    ) -> None:
        self._learner = learner
        self._texts = texts
        self._settings = settings
        self._observe = observe
        self._scorer = Scorer(model, model.stack_of(SkipSet(model.num_layers), token_ids=token_ids), settings.loss)
        self._held_out = _batches(texts.held_out(_HELD_OUT_POSITIONS), settings.batch_positions)
        rate = settings.learning_rate or _RATE * math.sqrt(_RATE_SIZE / model.config.hidden_size)
        self._rate = rate
        self._optimizer = torch.optim.AdamW(
            learner.parameters.values(), lr=rate, betas=_BETAS, weight_decay=settings.weight_decay
        )
        learned = sum(len(text.choices) for text in texts.learned())
        if not learned:
            raise InvalidInputError("prompts: there are too few different ones to learn from; give more")
        self._all_positions = settings.epochs * learned
        self._path = None if folder is None else folder / f"training-{self._digest(token_ids)}.safetensors"
        self.looks: list[EvalResult] = []
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
        texts = [self._texts.shards, self._texts.positions]
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

    def _rest_of_epoch(self) -> Iterator[list[TargetText]]:
        """The batches of the epoch that it is in, behind those that were done."""
        chance = random.Random(f"{self._settings.seed} {self.state.epoch}")
        done = self.state.batch
        for shard in chance.sample(self._texts.shards, len(self._texts.shards)):
            texts = list(self._texts.learned([shard]))
            chance.shuffle(texts)
            for batch in _batches(texts, self._settings.batch_positions):
                if done:
                    done -= 1
                    continue
                yield batch

    def _step(self, batch: Sequence[TargetText]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * _schedule(self._progress())
        self._optimizer.zero_grad()
        self._scorer.learn_from(self._learner, batch)
        torch.nn.utils.clip_grad_norm_(self._learner.parameters.values(), _LARGEST_GRADIENT)
        self._optimizer.step()
        self.state.batch += 1
        self.state.positions += sum(len(text.choices) for text in batch)

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
        self.looks.append(EvalResult(self._progress(), state.seconds, agreement, better))
        if self._path is not None:
            write_state(self._path, state, self._learner.parameters, self._optimizer)
        self._observe(self.looks[-1])


def _schedule(progress: float) -> float:
    """The share of the highest learning rate: it rises at first, then falls as a cosine to nothing."""
    if progress < _WARM_UP:
        return (progress + 0.1 * _WARM_UP) / (1.1 * _WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def _batches(texts: Sequence[TargetText], positions: int) -> list[list[TargetText]]:
    """Texts in order, in batches of about so many asked positions."""
    batches: list[list[TargetText]] = []
    room = 0
    for text in texts:
        if room <= 0:
            batches.append([])
            room = positions
        batches[-1].append(text)
        room -= len(text.choices)
    return batches
