"""What the full model is asked, so that it writes the texts that stand-ins learn from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from layerskip.errors import InvalidInputError
from layerskip.side_by_side import continuations
from layerskip.stack.model import LayerSkipModel

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
            written = continuations(self._model, [self._before] * size, _LONGEST_PROMPT, temperature=self._temperature)
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
