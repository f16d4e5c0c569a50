"""Texts to learn from: written by the full model, with its hidden states at both ends of what is stood in for.

Kept on disk in shards of some texts each, so that memory holds one shard at a time and an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from layerskip.errors import InvalidInputError, LayerSkipError
from layerskip.files import keeping, write_bytes_atomically
from layerskip.machine import library_versions
from layerskip.side_by_side import continuations
from layerskip.stack.model import LayerSkipModel
from layerskip.tuning.prompting import PromptSource, seeded

# Of so many prompts one is held out, by what it says, so that the same prompt is never on both sides.
_HELD_OUT_OF = 16
# Where nothing is asked, nothing was chosen.
NOT_ASKED = -1
# Room that is left on the disk for others, as a share of what the texts need.
_SPARE = 1.1
_WHAT = "the texts to learn from"


@dataclass(frozen=True)
class DataSettings:
    """What to write and to keep.

    Args:
        exit: Layers of the model below what is stood in for, from 1 to ``num_layers - 1``.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the full model's likeliest tokens; above, answers are sampled.
        side_by_side: Texts written at a time, which make up one shard.
        seed: Decides what is sampled.

    Raises:
        InvalidInputError: A number is out of its range.
    """

    exit: int
    max_new_tokens: int = 128
    temperature: float = 0.0
    side_by_side: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("exit", "max_new_tokens", "side_by_side"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInputError(f"temperature: expected a number from 0 on, got {self.temperature}")


@dataclass(frozen=True, eq=False)
class TuningText:
    """One text of ``n + 1`` tokens, of which ``n`` went through the full model.

    Args:
        tokens: ``[n]``, the prompt and the answer but for its last token.
        before: ``[n, hidden_size]``, hidden states before the first sublayer that is stood in for.
        after: ``[n, hidden_size]``, hidden states after the full model's last sublayer.
        choices: ``[n]``, the full model's likeliest token behind each position of the answer and behind the prompt's
            last; ``NOT_ASKED`` elsewhere.
    """

    tokens: Tensor
    before: Tensor
    after: Tensor
    choices: Tensor

    @property
    def asked(self) -> Tensor:
        """``[n]``, where a draft would be asked for the next token."""
        return self.choices != NOT_ASKED

    def copied(self) -> TuningText:
        """The same in memory of its own, so that it does not hold on to its shard."""
        return TuningText(self.tokens.clone(), self.before.clone(), self.after.clone(), self.choices.clone())

    @property
    def prompt(self) -> int:
        """A number that depends on the prompt alone."""
        tokens = self.tokens[~self.asked].tolist()
        return int(hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:15], 16)


class TuningData:
    """Texts on disk. What is there already is used again, also by a run that wants more of them.

    Args:
        model: The full model.
        prompts: What to ask it.
        settings: What to write and to keep.
        folder: Where texts of all models are kept.
        fingerprint: Of the model's weights, as in :class:`layerskip.ModelIdentity`.

    Raises:
        InvalidInputError: The exit is not inside the model.
        LayerSkipError: The folder cannot be written.
    """

    def __init__(
        self, model: LayerSkipModel, prompts: PromptSource, settings: DataSettings, folder: Path, fingerprint: str
    ) -> None:
        if settings.exit >= model.num_layers:
            raise InvalidInputError(
                f"exit: expected 1 to {model.num_layers - 1}, layers of the model to keep below what is stood in for, "
                f"got {settings.exit}"
            )
        self._model = model
        self._prompts = prompts
        self._settings = settings
        what = [fingerprint, str(model.dtype), asdict(settings), prompts.fingerprint, library_versions()]
        self.folder = folder / f"tuning-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"
        with keeping(self.folder, _WHAT):
            self.folder.mkdir(parents=True, exist_ok=True)

    def collect(self, positions: int, observe: Callable[[int], None] = lambda positions: None) -> Shards:
        """Write texts until there are so many positions at which a draft would be asked, or no more prompts.

        Args:
            positions: How many are wanted.
            observe: Told how many there are, after each shard.

        Returns:
            The shards, as many as it takes.

        Raises:
            InvalidInputError: There are no prompts.
            LayerSkipError: The disk has no room.
        """
        self._check_room(positions)
        paths: list[Path] = []
        found = 0
        while found < positions:
            path = self.folder / f"{len(paths):05}.safetensors"
            count = _asked_positions(path)
            if count is None:
                portion = self._prompts.portion(len(paths), self._settings.side_by_side)
                if not portion:
                    break
                texts = self._write(portion, len(paths))
                count = sum(int(text.asked.sum()) for text in texts)
                with keeping(path, _WHAT):
                    write_bytes_atomically(path, _to_bytes(texts, count))
            paths.append(path)
            found += count
            observe(found)
        if not found:
            raise InvalidInputError("prompts: the model had nothing to say to any of them; give others")
        return Shards(paths, found)

    def _write(self, prompts: Sequence[Sequence[int]], number: int) -> list[TuningText]:
        """Let the full model answer, and keep its hidden states on the way."""
        with (
            seeded(f"{self._settings.seed} answers {number}", self._model.device),
            _recording(self._model, self._settings.exit) as recorded,
        ):
            answers = continuations(
                self._model, prompts, self._settings.max_new_tokens, temperature=self._settings.temperature
            )
        before, after = (torch.cat(part, dim=1) for part in (recorded.before, recorded.after))  # [b, columns, hidden]
        choices = torch.stack(recorded.choices, dim=1).cpu()  # [b, steps]
        longest = max(map(len, prompts))
        return [
            _text(prompt, answer, before[row].cpu(), after[row].cpu(), choices[row], longest)
            for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    def _check_room(self, positions: int) -> None:
        # Both ends, in two bytes a number; prompts and padding are about as long as answers at most.
        needed = int(_SPARE * 2 * positions * 2 * 2 * self._model.config.hidden_size)
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if needed - there > free:
            raise LayerSkipError(
                f"{self.folder}: {positions} positions take up to {(needed - there) / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB are free; lower --positions, or set LAYERSKIP_CACHE to another folder"
            )


@dataclass(frozen=True)
class Shards:
    """Texts on disk.

    Args:
        paths: The shards.
        positions: Positions at which a draft would be asked, in all of them.
    """

    paths: Sequence[Path]
    positions: int

    def texts(self, path: Path) -> list[TuningText]:
        """The texts of one shard; their tensors are read from disk when they are used."""
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        parts = (tensors[name].split(lengths) for name in ("tokens", "before", "after", "choices"))
        return [TuningText(*row) for row in zip(*parts, strict=True)]

    def learned(self, paths: Sequence[Path]) -> Iterator[TuningText]:
        """The texts of some shards to learn from."""
        return (text for path in paths for text in self.texts(path) if text.prompt not in self._kept_out)

    def held_out(self, most: int) -> list[TuningText]:
        """Texts to test with, of about ``most`` positions together."""
        chosen: list[TuningText] = []
        found = 0
        for path in self.paths:
            for text in self.texts(path):
                if text.prompt in self._kept_out and found < most:
                    chosen.append(text.copied())
                    found += int(text.asked.sum())
        return chosen

    @cached_property
    def _kept_out(self) -> frozenset[int]:
        """The prompts whose texts nothing may be learned from: one of several at least, however few there are."""
        prompts = {text.prompt for path in self.paths for text in self.texts(path)}
        return frozenset(prompt for prompt in prompts if prompt % _HELD_OUT_OF == 0) or frozenset([min(prompts)])


@dataclass
class _Recorded:
    """What passes went by: for each, ``[b, n, hidden_size]`` and the last position's choice, ``[b]``."""

    before: list[Tensor]
    after: list[Tensor]
    choices: list[Tensor]


@contextmanager
def _recording(model: LayerSkipModel, exit_layer: int) -> Iterator[_Recorded]:
    """Keep what goes by in the full model's passes meanwhile, in bfloat16."""
    recorded = _Recorded([], [], [])
    decoder: Any = model.hf_model.base_model

    def keep(states: list[Tensor]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append((args[0] if args else kwargs["hidden_states"]).to(torch.bfloat16))

        return hook

    def choose(module: Any, args: tuple[Any, ...], logits: Tensor) -> None:
        recorded.choices.append(logits[:, -1].argmax(-1))

    with ExitStack() as hooks:
        for handle in (
            decoder.layers[exit_layer].register_forward_pre_hook(keep(recorded.before), with_kwargs=True),
            decoder.norm.register_forward_pre_hook(keep(recorded.after), with_kwargs=True),
            model.hf_model.get_output_embeddings().register_forward_hook(choose),
        ):
            hooks.callback(handle.remove)
        yield recorded


def _text(
    prompt: Sequence[int], answer: Sequence[int], before: Tensor, after: Tensor, choices: Tensor, longest: int
) -> TuningText:
    """One row of a batch that was padded on the left to ``longest`` tokens before the answers."""
    tokens = [*prompt, *answer[:-1]]
    columns = slice(longest - len(prompt), longest - len(prompt) + len(tokens))
    asked = choices.new_full((len(tokens),), NOT_ASKED)
    asked[len(prompt) - 1 :] = choices[: len(answer)]
    return TuningText(torch.tensor(tokens), before[columns], after[columns], asked)


def _to_bytes(texts: Sequence[TuningText], asked: int) -> bytes:
    parts = {name: torch.cat([getattr(text, name) for text in texts]) for name in ("before", "after")}
    ids = {name: torch.cat([getattr(text, name) for text in texts]).int() for name in ("tokens", "choices")}
    lengths = {"lengths": torch.tensor([len(text.tokens) for text in texts]), "asked": torch.tensor(asked)}
    return save({name: tensor.contiguous() for name, tensor in (parts | ids | lengths).items()})


def _asked_positions(path: Path) -> int | None:
    """How many positions a shard has; None if it is not there or not whole."""
    try:
        return int(load_file(path)["asked"])
    except (OSError, SafetensorError, KeyError):
        return None
