"""The draft vocabulary of a trained draft: the tokens that the target model says in the texts it learns from."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from layerskip.drafting.vocabulary import draft_vocabulary, emission_frequencies
from layerskip.errors import InvalidInputError, LayerSkipError
from layerskip.model import LayerSkipModel
from layerskip.utils import cache_write_errors, library_versions, write_bytes_atomically


@torch.inference_mode()
def batch_generate(
    model: LayerSkipModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0
) -> list[list[int]]:
    """The target model's continuations of several prompts, decoded side by side by transformers.

    Args:
        model: The model.
        prompts: Token ids.
        max_new_tokens: Most new tokens for each.
        temperature: 0 is greedy; above, tokens are sampled with torch's own random state.

    Returns:
        The new tokens of each; an end-of-sequence token is the last of them.
    """
    longest = max(map(len, prompts))
    eos = sorted(model.eos_token_ids)
    padding = eos[0] if eos else 0
    rows = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        **(sampled if temperature else {"do_sample": False}),
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=padding,
    )
    out: Tensor = model.hf_model.generate(  # type: ignore[operator]
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        generation_config=settings,
    )
    return [_until_end(row[longest:], model.eos_token_ids) for row in out.tolist()]


def _until_end(tokens: list[int], eos: frozenset[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


_LONGEST_PROMPT = 64
_SHORTEST_PROMPT = 4
# Stands for the user's words in a rendered chat template.
_WORDS = "the-words-of-the-user"


class PromptSource(Protocol):
    """Gives prompts in portions, the same ones each time."""

    def portion(self, number: int, size: int) -> list[list[int]]:
        """Token ids of the ``number``-th ``size`` prompts; fewer, or none, where there are no more."""

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the prompts."""


class GivenPrompts:
    """Prompts from a list, in an order of their own each time around.

    Args:
        prompts: Token ids.
        rounds: How often each may be asked; more than once is of use only where answers are sampled.
        seed: Decides the order.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], *, rounds: int = 1, seed: int = 0) -> None:
        self._prompts = [list(prompt) for prompt in prompts]
        self._rounds = rounds
        self._seed = seed

    def portion(self, number: int, size: int) -> list[list[int]]:
        total = len(self._prompts) * self._rounds
        return [self._at(place) for place in range(number * size, min((number + 1) * size, total))]

    def _at(self, place: int) -> list[int]:
        around, index = divmod(place, len(self._prompts))
        order = random.Random(f"{self._seed} {around}").sample(range(len(self._prompts)), len(self._prompts))
        return self._prompts[order[index]]

    @property
    def fingerprint(self) -> str:
        return _digest([self._prompts, self._rounds, self._seed])


class SelfWrittenPrompts:
    """Prompts that an instruction model writes itself, behind the part of its chat template that comes before them.

    Source: Magpie (Xu et al., arXiv 2406.08464).

    Args:
        model: The model.
        tokenizer: Its tokenizer, with a chat template.
        seed: Decides what is written.
        temperature: Of the sampling.

    Raises:
        InvalidInputError: The tokenizer has no chat template, or it does not show the user's words, or the model's
            end-of-sequence token is not known.
    """

    def __init__(
        self, model: LayerSkipModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, temperature: float = 1.0
    ) -> None:
        if not tokenizer.chat_template:
            raise InvalidInputError("the model's tokenizer has no chat template to write prompts in; give --prompts")
        if not model.eos_token_ids:
            raise InvalidInputError("the model has no end-of-sequence token to end its own prompts; give --prompts")
        message = [{"role": "user", "content": _WORDS}]
        shown = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        before, words, behind = shown.partition(_WORDS)
        if not words:
            raise InvalidInputError("the model's chat template does not show what the user says; give --prompts")
        self._before, self._behind = (
            list(tokenizer(part, add_special_tokens=False).input_ids) for part in (before, behind)
        )
        self._model = model
        self._seed = seed
        self._temperature = temperature

    def portion(self, number: int, size: int) -> list[list[int]]:
        with seeded(f"{self._seed} prompts {number}", self._model.device):
            written = batch_generate(self._model, [self._before] * size, _LONGEST_PROMPT, temperature=self._temperature)
        ended = [words[:-1] for words in written if words[-1] in self._model.eos_token_ids]
        return [[*self._before, *words, *self._behind] for words in ended if len(words) >= _SHORTEST_PROMPT]

    @property
    def fingerprint(self) -> str:
        return _digest([self._before, self._behind, self._seed, self._temperature])


@contextmanager
def seeded(name: str, device: torch.device) -> Iterator[None]:
    """Let torch draw what belongs to a name meanwhile, and go on as before behind it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))
        yield


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


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
        temperature: 0 takes the target model's likeliest tokens; above, answers are sampled.
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
    """One text of ``n + 1`` tokens, of which ``n`` went through the target model.

    Args:
        tokens: ``[n]``, the prompt and the answer but for its last token.
        before: ``[n, hidden_size]``, hidden states before the first sublayer that is stood in for.
        after: ``[n, hidden_size]``, hidden states after the target model's last sublayer.
        choices: ``[n]``, the target model's likeliest token behind each position of the answer and behind the prompt's
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
        model: The target model.
        prompts: What to ask it.
        settings: What to write and to keep.
        folder: Where texts of all models are kept.
        fingerprint: Of the model's weights, as in :class:`layerskip.fingerprint.ModelIdentity`.

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
        with cache_write_errors(self.folder, _WHAT):
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
                with cache_write_errors(path, _WHAT):
                    write_bytes_atomically(path, _to_bytes(texts, count))
            paths.append(path)
            found += count
            observe(found)
        if not found:
            raise InvalidInputError("prompts: the model had nothing to say to any of them; give others")
        return Shards(paths, found)

    def _write(self, prompts: Sequence[Sequence[int]], number: int) -> list[TuningText]:
        """Let the target model answer, and keep its hidden states on the way."""
        with (
            seeded(f"{self._settings.seed} answers {number}", self._model.device),
            _recording(self._model, self._settings.exit) as recorded,
        ):
            answers = batch_generate(
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
    """Keep what goes by in the target model's passes meanwhile, in bfloat16."""
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


# Positions whose probabilities are summed up; of all others only the choice counts.
_POSITIONS = 4096


def vocabulary_of(model: LayerSkipModel, shards: Shards, size: int) -> Tensor:
    """The ids of a draft vocabulary, ascending, ``[size]``.

    Args:
        model: The target model.
        shards: What it wrote; held-out texts do not count.
        size: Tokens wanted, at most ``vocab_size``.
    """
    counts = torch.zeros(model.vocab_size)
    states: list[Tensor] = []
    share = max(shards.positions // _POSITIONS, 1)
    for text in shards.learned(shards.paths):
        counts += text.choices[text.asked].bincount(minlength=model.vocab_size)
        states.append(text.after[text.asked][::share])
    some = torch.cat(states)[:_POSITIONS].to(model.device, model.dtype)
    frequencies = emission_frequencies(model, some).cpu() + counts
    return draft_vocabulary(frequencies, model.eos_token_ids, size)
