"""Texts to train drafts on: prompts, the target model's answers with its hidden states, and the draft vocabulary."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerskip.drafting.vocabulary import draft_vocabulary, emission_frequencies
from layerskip.errors import InvalidInputError, LayerSkipError
from layerskip.model import LayerSkipModel
from layerskip.target_texts import TargetText, TextStore, batch_generate, likeliest
from layerskip.utils import digest

_LONGEST_PROMPT = 64
_SHORTEST_PROMPT = 4
# Placeholder for the user's words in a rendered chat template.
_WORDS = "the-words-of-the-user"


class GivenPrompts:
    """Prompts from a list, in another order each time around.

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
        """Token ids of the ``number``-th ``size`` prompts; fewer, or none, where there are no more."""
        total = len(self._prompts) * self._rounds
        return [self._at(place) for place in range(number * size, min((number + 1) * size, total))]

    def _at(self, place: int) -> list[int]:
        around, index = divmod(place, len(self._prompts))
        order = random.Random(f"{self._seed} {around}").sample(range(len(self._prompts)), len(self._prompts))
        return self._prompts[order[index]]

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the prompts."""
        return digest([self._prompts, self._rounds, self._seed])


class SelfWrittenPrompts:
    """Prompts that an instruction model writes itself, after the part of its chat template that precedes them.

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
        before, words, after = shown.partition(_WORDS)
        if not words:
            raise InvalidInputError("the model's chat template does not show what the user says; give --prompts")
        self._before, self._after = (
            list(tokenizer(part, add_special_tokens=False).input_ids) for part in (before, after)
        )
        self._model = model
        self._seed = seed
        self._temperature = temperature

    def portion(self, number: int, size: int) -> list[list[int]]:
        """Token ids of the ``number``-th ``size`` prompts, the same ones each time; unusable ones are left out."""
        with _seeded(f"{self._seed} prompts {number}", self._model.device):
            written = batch_generate(self._model, [self._before] * size, _LONGEST_PROMPT, temperature=self._temperature)
        ended = [words[:-1] for words in written if words[-1] in self._model.eos_token_ids]
        return [[*self._before, *words, *self._after] for words in ended if len(words) >= _SHORTEST_PROMPT]

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the prompts."""
        return digest([self._before, self._after, self._seed, self._temperature])


PromptSource = GivenPrompts | SelfWrittenPrompts


@contextmanager
def _seeded(name: str, device: torch.device) -> Iterator[None]:
    """Seed torch's random state by a name inside the block, and restore it after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(digest(name)[:15], 16))
        yield


# One prompt in so many is held out, by its content, so that the same prompt is never on both sides.
_HELD_OUT_OF = 16
# Room that is left on the disk for others, as a share of what the texts need.
_SPARE = 1.1


@dataclass(frozen=True)
class DataSettings:
    """What to write and to keep.

    Args:
        exit: Layers of the model below the draft layer or bridge, from 1 to ``num_layers - 1``.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the target model's most probable tokens; above, answers are sampled.
        batch_size: Texts decoded in a batch, which make up one shard.
        seed: Decides what is sampled.

    Raises:
        InvalidInputError: A number is out of its range.
    """

    exit: int
    max_new_tokens: int = 128
    temperature: float = 0.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("exit", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInputError(f"temperature: expected a number from 0 on, got {self.temperature}")


@dataclass(frozen=True)
class TrainingTexts:
    """Texts on disk to train on, in shards.

    The states of each text of ``n`` tokens, ``[2, n - 1, hidden_size]`` in bfloat16, are those before the first
    sublayer above the exit and those after the last sublayer; no pass has read the last token.

    Args:
        store: Where they are.
        shards: Their names there.
        positions: Positions at which a draft is asked, in all of them.
    """

    store: TextStore
    shards: Sequence[str]
    positions: int

    def learned(self, shards: Sequence[str] | None = None) -> Iterator[TargetText]:
        """The texts of some shards, or of all, to learn from; their tensors are read from disk when they are used."""
        texts = self._texts(self.shards if shards is None else shards)
        return (text for text in texts if _prompt_number(text) not in self._held_out)

    def held_out(self, most: int) -> list[TargetText]:
        """Texts to test with, of about ``most`` positions together."""
        chosen: list[TargetText] = []
        found = 0
        for text in self._texts(self.shards):
            if _prompt_number(text) in self._held_out and found < most:
                chosen.append(text)
                found += len(text.choices)
        return chosen

    def _texts(self, shards: Sequence[str]) -> Iterator[TargetText]:
        return (text for name in shards for text in self.store.read(name))

    @cached_property
    def _held_out(self) -> frozenset[int]:
        """The prompts whose texts nothing may be learned from: one of several at least, however few there are."""
        prompts = {_prompt_number(text) for text in self._texts(self.shards)}
        return frozenset(prompt for prompt in prompts if prompt % _HELD_OUT_OF == 0) or frozenset([min(prompts)])


def _prompt_number(text: TargetText) -> int:
    """A number that depends on the prompt alone."""
    return int(digest(text.tokens[: text.prompt_length].tolist()), 16)


class TrainingTextWriter:
    """Lets the target model write texts to train on; what is on disk already is used again.

    Args:
        model: The target model.
        prompts: What to ask it.
        settings: What to write and to keep.
        cache: Where texts of all models are kept.
        fingerprint: Of the model's weights, as in :class:`layerskip.ModelIdentity`.

    Raises:
        InvalidInputError: The exit is not inside the model.
        LayerSkipError: The folder cannot be written.
    """

    def __init__(
        self, model: LayerSkipModel, prompts: PromptSource, settings: DataSettings, cache: Path, fingerprint: str
    ) -> None:
        if settings.exit >= model.num_layers:
            raise InvalidInputError(
                f"exit: expected 1 to {model.num_layers - 1}, layers of the model to keep, got {settings.exit}"
            )
        self._model = model
        self._prompts = prompts
        self._settings = settings
        self._store = TextStore(model, fingerprint, cache, "training", asdict(settings), prompts.fingerprint)

    def collect(self, positions: int, observe: Callable[[int], None] = lambda positions: None) -> TrainingTexts:
        """Write texts until there are so many positions at which a draft is asked, or no more prompts.

        Args:
            positions: How many are wanted.
            observe: Called with the number so far, after each shard.

        Returns:
            As many shards as it takes.

        Raises:
            InvalidInputError: There are no prompts.
            LayerSkipError: The disk has no room.
        """
        self._check_room(positions)
        shards: list[str] = []
        found = 0
        while found < positions:
            count = sum(len(text.choices) for text in self._shard(len(shards)))
            if not count:
                break
            shards.append(_name(len(shards)))
            found += count
            observe(found)
        if not found:
            raise InvalidInputError("prompts: the model's answers are all empty; give other prompts")
        return TrainingTexts(self._store, shards, found)

    def _shard(self, number: int) -> list[TargetText]:
        """The texts of a shard, written now if they are not on disk; none where there are no more prompts."""
        texts = self._store.find(_name(number))
        if texts is not None:
            return texts
        prompts = self._prompts.portion(number, self._settings.batch_size)
        if not prompts:
            return []
        with _seeded(f"{self._settings.seed} answers {number}", self._model.device):
            texts = _answered(self._model, prompts, self._settings)
        self._store.write(_name(number), texts)
        return texts

    def _check_room(self, positions: int) -> None:
        # Both boundaries, in two bytes a number; prompts and padding are about as long as answers at most.
        needed = int(_SPARE * 2 * positions * 2 * 2 * self._model.config.hidden_size)
        there = sum(path.stat().st_size for path in self._store.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self._store.folder).free
        if needed - there > free:
            raise LayerSkipError(
                f"{self._store.folder}: {positions} positions take up to {(needed - there) / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB are free; lower --positions, or set LAYERSKIP_CACHE to another folder"
            )


def _name(shard: int) -> str:
    return f"{shard:05}"


def _answered(model: LayerSkipModel, prompts: Sequence[Sequence[int]], settings: DataSettings) -> list[TargetText]:
    """Let the target model answer some prompts, and keep its hidden states on the way.

    Texts of a training are many, so that a pass over each afterwards, as for the search's reference, would take two
    thirds as long again on a CPU.
    """
    with _recording(model, settings.exit) as passes:
        answers = batch_generate(model, prompts, settings.max_new_tokens, temperature=settings.temperature)
    states = torch.stack([torch.cat(part, dim=1).cpu() for part in (passes.before, passes.after)], dim=1)
    best = [torch.stack(part, dim=1).cpu() for part in zip(*passes.best, strict=True)]  # [b, steps] each
    longest = max(map(len, prompts))
    texts = []
    for prompt, answer, row, choices, confidence in zip(prompts, answers, states, *best, strict=True):
        first, steps = longest - len(prompt), slice(1, len(answer))  # rows are padded on the left
        texts.append(
            TargetText(
                tokens=torch.tensor([*prompt, *answer], dtype=torch.int),
                prompt_length=len(prompt),
                choices=choices[steps],
                confidence=confidence[steps],
                states=row[:, first : longest + len(answer) - 1],
            )
        )
    return texts


@dataclass
class _Passes:
    """What the passes of a batch left: for each pass ``[b, n, hidden_size]`` states, and its last position's best."""

    before: list[Tensor]
    after: list[Tensor]
    best: list[tuple[Tensor, Tensor]]


@contextmanager
def _recording(model: LayerSkipModel, exit_layer: int) -> Iterator[_Passes]:
    """Keep the states of the target model's passes inside the block, in bfloat16, and what it chose."""
    passes = _Passes([], [], [])
    decoder: Any = model.hf_model.base_model

    def keep(states: list[Tensor]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append((args[0] if args else kwargs["hidden_states"]).to(torch.bfloat16))

        return hook

    def choose(module: Any, args: tuple[Any, ...], output: Any) -> None:
        passes.best.append(likeliest(output.logits[:, -1].float()))

    with ExitStack() as hooks:
        for handle in (
            decoder.layers[exit_layer].register_forward_pre_hook(keep(passes.before), with_kwargs=True),
            decoder.norm.register_forward_pre_hook(keep(passes.after), with_kwargs=True),
            model.hf_model.register_forward_hook(choose),
        ):
            hooks.callback(handle.remove)
        yield passes


# Positions whose probabilities are summed up; of all others only the choice counts.
_POSITIONS = 4096


def vocabulary_of(model: LayerSkipModel, texts: TrainingTexts, size: int) -> Tensor:
    """The ids of a draft vocabulary, ascending, ``[size]``.

    Args:
        model: The target model.
        texts: What it wrote; held-out texts do not count.
        size: Tokens wanted, at most ``vocab_size``.
    """
    counts = torch.zeros(model.vocab_size)
    states: list[Tensor] = []
    share = max(texts.positions // _POSITIONS, 1)
    for text in texts.learned():
        counts += text.choices.bincount(minlength=model.vocab_size)
        states.append(text.states[1, text.draft_positions][::share])
    some = torch.cat(states)[:_POSITIONS].to(model.device, model.dtype)
    frequencies = emission_frequencies(model, some).cpu() + counts
    return draft_vocabulary(frequencies, model.eos_token_ids, size)
