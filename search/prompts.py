"""Prompts to search with: the built-in set, files, and the part that is held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerskip.errors import InvalidInputError
from layerskip.tokenizer import encode_chat, encode_prompt

# One prompt of this many is held out.
HOLD_OUT_EVERY = 4


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        content: A text, to be wrapped as a user turn where the model has a chat template; or the messages of a chat,
            as (role, content) pairs.
    """

    content: str | tuple[tuple[str, str], ...]

    @property
    def id(self) -> str:
        """A short name that depends on the content alone."""
        return hashlib.sha256(json.dumps(self.content).encode()).hexdigest()[:12]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids, ready for the model's answer.

        Raises:
            InvalidInputError: The prompt is a chat and the tokenizer has no template, or the template refuses it.
        """
        if isinstance(self.content, str):
            return encode_prompt(tokenizer, self.content)
        return encode_chat(tokenizer, [{"role": role, "content": content} for role, content in self.content])


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids."""

    id: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PromptSplit:
    """Prompts that the search may use, and prompts kept aside for the final figures."""

    search: tuple[EncodedPrompt, ...]
    held_out: tuple[EncodedPrompt, ...]

    @property
    def fingerprint(self) -> str:
        """Changes when any prompt, its tokens or its part changes."""
        parts = [[(prompt.id, prompt.tokens) for prompt in part] for part in (self.search, self.held_out)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def built_in_prompts() -> list[Prompt]:
    """The 32 prompts that ship with layerskip: chat, summarizing, code and reasoning, eight of each."""
    text = (files("search") / "data" / "prompts.jsonl").read_text(encoding="utf-8")
    return [Prompt(json.loads(line)["prompt"]) for line in text.splitlines()]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a file: one a line, or with the suffix ``.jsonl`` one JSON object a line.

    A JSON object has a ``prompt`` (a text) or ``messages`` (a list of objects with ``role`` and ``content``). Blank
    lines are passed over.

    Raises:
        InvalidInputError: The file cannot be read, holds no prompt, or a line is not a prompt. The message names the
            file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: not a text file; expected one prompt a line") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot read the prompts: {error.strerror}") from error
    # Not splitlines(): it also splits at characters that a prompt may contain.
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    filled = ((number, line) for number, line in lines if line)
    prompts = list(_from_jsonl(path, filled)) if path.suffix == ".jsonl" else [Prompt(line) for _, line in filled]
    if not prompts:
        raise InvalidInputError(f"{path}: holds no prompt; expected one a line")
    return prompts


def _from_jsonl(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Prompt]:
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidInputError(f"{where}: not JSON: {error.msg}") from error
        match entry:
            case {"prompt": str(text)} if text.strip():
                yield Prompt(text)
            case {"messages": [_, *_] as messages}:
                yield Prompt(tuple(_message(where, message) for message in messages))
            case _:
                raise InvalidInputError(
                    f"{where}: expected an object with a 'prompt' (a text) or 'messages' (a list of role and content)"
                )


def _message(where: str, message: Any) -> tuple[str, str]:
    match message:
        case {"role": str(role), "content": str(content)}:
            return role, content
    raise InvalidInputError(f"{where}: each of 'messages' needs a 'role' and a 'content', both texts")


def encode_different(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, context_length: int
) -> list[EncodedPrompt]:
    """Encode prompts; repeated ones count once. The arguments are those of :func:`split_prompts`.

    Raises:
        InvalidInputError: A prompt is too long for the model's context.
    """
    encoded: dict[Prompt, EncodedPrompt] = {}
    for number, prompt in enumerate(prompts, start=1):
        if prompt in encoded:
            continue
        tokens = tuple(prompt.encode(tokenizer))
        if len(tokens) + max_new_tokens > context_length:
            raise InvalidInputError(
                f"prompt {number}: {len(tokens)} tokens and {max_new_tokens} new ones do not fit the model's "
                f"context of {context_length}; shorten the prompt or lower --max-new-tokens"
            )
        encoded[prompt] = EncodedPrompt(prompt.id, tokens)
    return list(encoded.values())


def prompts_to_measure(
    own: Sequence[Prompt] | None, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, context_length: int
) -> list[EncodedPrompt]:
    """Somebody's own prompts, encoded; or the built-in ones that searches hold out.

    Args:
        own: The prompts; None takes the built-in ones.
        tokenizer: As in :func:`split_prompts`, like what follows.

    Raises:
        InvalidInputError: A prompt is too long for the model's context.
    """
    limits = {"max_new_tokens": max_new_tokens, "context_length": context_length}
    if own is None:
        return list(split_prompts(built_in_prompts(), tokenizer, **limits).held_out)
    return encode_different(own, tokenizer, **limits)


def split_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, context_length: int
) -> PromptSplit:
    """Encode prompts and hold out a quarter of them, at least one.

    Every fourth prompt is held out, so that a file ordered by kind keeps all kinds in both parts. The order of each
    part is shuffled, always in the same way, so that the first few of it are a fair sample.

    Args:
        prompts: At least two different prompts; repeated ones count once.
        tokenizer: The model's tokenizer.
        max_new_tokens: Tokens that will be generated behind each prompt.
        context_length: Positions that the model has.

    Raises:
        InvalidInputError: There are fewer than two prompts, or one is too long for the model's context.
    """
    different = encode_different(prompts, tokenizer, max_new_tokens=max_new_tokens, context_length=context_length)
    if len(different) < 2:
        raise InvalidInputError("prompts: expected at least 2 different ones, one to search with and one to hold out")
    every = min(HOLD_OUT_EVERY, len(different))
    held_out = different[every - 1 :: every]
    search = [prompt for prompt in different if prompt not in held_out]
    for part in (search, held_out):
        random.Random(0).shuffle(part)
    return PromptSplit(tuple(search), tuple(held_out))
