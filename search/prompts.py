"""Prompts for measuring: the built-in set, encoded, and the part that is held out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from transformers import PreTrainedTokenizerBase

from layerskip.errors import InvalidInputError
from layerskip.tokenizer import Prompt
from layerskip.utils import digest
from search.settings import SearchSettings

# One prompt of this many is held out.
HOLD_OUT_EVERY = 4
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids.

    Args:
        id: Tells it from others.
        tokens: Up to where the answer begins; in a conversation, that of its last turn.
        earlier: The prompts of a conversation's earlier turns, which are answered first.
        category: Under which a suite counts it; empty outside of suites.
    """

    id: str
    tokens: tuple[int, ...]
    earlier: tuple[tuple[int, ...], ...] = ()
    category: str = ""

    @property
    def turns(self) -> tuple[tuple[int, ...], ...]:
        """The prompts of all turns."""
        return (*self.earlier, self.tokens)


@dataclass(frozen=True)
class PromptSplit:
    """Prompts for the search, and held-out prompts for the final measurement."""

    search: tuple[EncodedPrompt, ...]
    held_out: tuple[EncodedPrompt, ...]

    @property
    def fingerprint(self) -> str:
        """A checksum of the prompts, their tokens and their parts."""
        parts = [[(prompt.id, prompt.tokens) for prompt in part] for part in (self.search, self.held_out)]
        return digest(parts)


@dataclass(frozen=True)
class SearchPrompts:
    """The prompts of a search by their use.

    Args:
        scored: Predictions compare drafts with the target model's continuations of these.
        fitted: Bridges and draft vocabularies are fitted to the continuations of these; on them a draft looks better
            than it is.
        measured: Measured candidates decode these, the first of the scored ones.
        held_out: Finalists decode these.
    """

    scored: tuple[EncodedPrompt, ...]
    fitted: tuple[EncodedPrompt, ...]
    measured: tuple[EncodedPrompt, ...]
    held_out: tuple[EncodedPrompt, ...]

    @classmethod
    def of(cls, split: PromptSplit, settings: SearchSettings) -> SearchPrompts:
        """Half of the search's prompts are scored, or as many as are measured; a few are both scored and fitted."""
        scored = max((len(split.search) + 1) // 2, settings.prompts_per_trial)
        return cls(
            split.search[:scored],
            split.search[scored:] or split.search,
            split.search[: settings.prompts_per_trial],
            split.held_out[: settings.held_out_prompts],
        )


def built_in_prompts() -> list[Prompt]:
    """The 32 prompts that ship with layerskip: chat, summarizing, code and reasoning, eight of each."""
    text = (files("search") / "data" / "prompts.jsonl").read_text(encoding="utf-8")
    return [Prompt(json.loads(line)["prompt"]) for line in text.splitlines()]


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
    """The user's own prompts, or the built-in ones that searches hold out, as token ids.

    Args:
        own: The user's prompts; None for the built-in ones.
        tokenizer: As in :func:`split_prompts`.
        max_new_tokens: As in :func:`split_prompts`.
        context_length: As in :func:`split_prompts`.

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
    part is such that its first prompts, however many, are spread over the file: a fair sample of all kinds.

    Args:
        prompts: At least two different prompts; repeated ones count once.
        tokenizer: The model's tokenizer.
        max_new_tokens: Tokens that will be generated after each prompt.
        context_length: Positions of the model's context.

    Raises:
        InvalidInputError: There are fewer than two prompts, or one is too long for the model's context.
    """
    different = encode_different(prompts, tokenizer, max_new_tokens=max_new_tokens, context_length=context_length)
    if len(different) < 2:
        raise InvalidInputError("prompts: expected at least 2 different ones, one for the search and one to hold out")
    every = min(HOLD_OUT_EVERY, len(different))
    held_out = different[every - 1 :: every]
    search = [prompt for number, prompt in enumerate(different, start=1) if number % every]
    return PromptSplit(_spread(search), _spread(held_out))


def _spread(prompts: Sequence[EncodedPrompt]) -> tuple[EncodedPrompt, ...]:
    """Prompts in an order in which the first ones, however many, are spread evenly (multiples of the golden ratio)."""
    order = sorted(range(len(prompts)), key=lambda number: (number + 1) * _GOLDEN_RATIO % 1)
    return tuple(prompts[number] for number in order)
