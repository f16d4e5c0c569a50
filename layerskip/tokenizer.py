"""Text as it comes, token by token, and which of it was drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


# What decoding puts in place of a character whose last bytes are still to come.
_UNFINISHED = "�"


@dataclass(frozen=True)
class TextSegment:
    """A part of a text, of whole characters.

    Args:
        text: The part, never empty.
        drafted: Whether all of its tokens were drafted, and accepted.
    """

    text: str
    drafted: bool


class StreamingDetokenizer:
    """Turns tokens into text as they come. Characters that span tokens come whole; special tokens have no text.

    Args:
        tokenizer: Turns token ids into text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # The last piece's tokens go before the new ones: some tokenizers write a token alone without its space.
        self._before: list[int] = []
        self._new: list[int] = []
        self._drafted = True

    def put(self, token: int, drafted: bool) -> list[TextSegment]:
        """Take the next token; the text that is whole with it, if any.

        Args:
            token: Its id.
            drafted: Whether it was drafted, and accepted.
        """
        self._new.append(token)
        self._drafted &= drafted
        text = self._text()
        return [] if not text or text.endswith(_UNFINISHED) else self._taken(text)

    def end(self) -> list[TextSegment]:
        """What is left when no token follows: a character without its last bytes, or nothing."""
        text = self._text()
        return self._taken(text) if text else []

    def _text(self) -> str:
        """The text of the new tokens."""
        return self._decode(self._before + self._new)[len(self._decode(self._before)) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _taken(self, text: str) -> list[TextSegment]:
        piece = TextSegment(text, self._drafted)
        self._before, self._new, self._drafted = self._new, [], True
        return [piece]
