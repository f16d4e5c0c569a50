"""Between text and token ids: prompts in, stop strings out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerskip.errors import InvalidInputError

# Behind the longest stop string, tokens enough that a multi-byte character cut in two is whole again.
_MARGIN = 8


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, wrapped as one user turn if the tokenizer has a chat template."""
    if tokenizer.chat_template:
        return encode_chat(tokenizer, [{"role": "user", "content": text}])
    return encode_raw(tokenizer, text)


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it is.

    Raises:
        InvalidInputError: It is no text.
    """
    _check_text(text)
    return list(tokenizer(text).input_ids)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, ready for the model's answer.

    Raises:
        InvalidInputError: The tokenizer has no chat template, the template refuses the messages, or one is no text.
    """
    for message in messages:
        _check_text(message["content"])
    if not tokenizer.chat_template:
        raise InvalidInputError("messages: the model's tokenizer has no chat template; give plain prompts")
    try:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates are programs of their own and raise what they like
        raise InvalidInputError(f"messages: the model's chat template refused them: {error}") from error
    return list(ids)


def _check_text(text: str) -> None:
    """Python takes bytes of a command line or of stdin that are not UTF-8 for lone surrogates; tokenizers do not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"prompt: character {error.start + 1} is no text in UTF-8") from error


class StopStrings:
    """A stop rule for decoding: the text is over when it holds one of some strings.

    Args:
        tokenizer: Turns token ids into text.
        strings: The strings; none of them empty.

    Raises:
        InvalidInputError: There is no string, or one is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        if not strings or not all(strings):
            raise InvalidInputError("stop strings: expected at least one, none of them empty")
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        # A token gives at least one byte of text, so this many at the end cover a match that the newest completes.
        self._tail = max(len(s.encode()) for s in strings) + _MARGIN

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens holds a stop string near its end."""
        text = self._tokenizer.decode(list(tokens[-self._tail :]))
        return any(string in text for string in self._strings)
