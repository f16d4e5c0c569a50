"""Prompts to token ids, and generated tokens to text: encoding, stop strings, streaming."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerskip.checks import instance, shown
from layerskip.errors import InvalidInputError
from layerskip.utils import digest

# Tokens to decode beyond the longest stop string, so that a multi-byte character cut in two is whole again.
_MARGIN = 8
# What tokenizers decode to in place of a character whose last bytes are still to come.
_UNFINISHED = "�"


@dataclass(frozen=True)
class Prompt:
    """A prompt: a text or the messages of a chat.

    Args:
        content: A text, which becomes a user turn if the model has a chat template; or the messages of a chat, as
            (role, content) pairs.
    """

    content: str | tuple[tuple[str, str], ...]

    @property
    def id(self) -> str:
        """The first 12 hexadecimal digits of the content's checksum."""
        return digest(self.content)[:12]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids up to where the model's answer begins.

        Raises:
            InvalidInputError: The prompt is a chat and the tokenizer has no template, or the template refuses it.
        """
        if isinstance(self.content, str):
            return encode_prompt(tokenizer, self.content)
        return encode_chat(tokenizer, [{"role": role, "content": content} for role, content in self.content])


def text_of(raw: str) -> str:
    """A text from a file or from stdin, as it would be as an argument or a string.

    Without a byte order mark; line ends are ``\\n``, and those at the end are left out, as a shell does in ``$(...)``.
    """
    return raw.removeprefix("\ufeff").replace("\r\n", "\n").rstrip("\r\n")


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a file: one a line, or with the suffix ``.jsonl`` one JSON object a line.

    A JSON object has a ``prompt`` (a text) or ``messages`` (a list of objects with ``role`` and ``content``). Blank
    lines are skipped.

    Raises:
        InvalidInputError: The file cannot be read, has no prompt, or a line is not a prompt. The message names the file
            and the line.
    """
    text = _read(path, "the prompts", "one prompt per line")
    # Not splitlines(): it also splits at characters that a prompt may contain.
    lines = enumerate(text.split("\n"), start=1)
    filled = ((number, line) for number, line in lines if line.strip())
    is_jsonl = path.suffix.lower() == ".jsonl"
    prompts = list(_from_jsonl(path, filled)) if is_jsonl else [Prompt(line) for _, line in filled]
    if not prompts:
        raise InvalidInputError(f"{path}: has no prompt; expected one per line")
    return prompts


def _read(path: Path, what: str, expected: str) -> str:
    """A file's text as :func:`text_of` has it."""
    try:
        return text_of(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: not a text file; expected {expected}") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot read {what}: {error.strerror}") from error


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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, wrapped as one user turn if the tokenizer has a chat template."""
    if tokenizer.chat_template:
        return encode_chat(tokenizer, [{"role": "user", "content": text}])
    return encode_raw(tokenizer, text)


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it is, without the chat template.

    Raises:
        InvalidInputError: The text is not valid Unicode.
    """
    _check_text(text)
    return list(tokenizer(text).input_ids)


def encode_corpus(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[int]:
    """Token ids of a file's text, as they would be inside of a text, to copy drafts from.

    Raises:
        InvalidInputError: The file cannot be read, is no text or is empty.
    """
    text = _read(path, "the corpus", "a text to copy drafts from")
    if not text.strip():
        raise InvalidInputError(f"{path}: is empty; expected a text to copy drafts from")
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the model's answer begins.

    Raises:
        InvalidInputError: The tokenizer has no chat template, the template refuses the messages, or one of them is not
            valid Unicode.
    """
    for message in messages:
        _check_text(message["content"])
    if not tokenizer.chat_template:
        raise InvalidInputError("messages: the model's tokenizer has no chat template; use plain prompts")
    try:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates are programs of their own and raise what they like
        raise InvalidInputError(f"messages: the model's chat template refused them: {error}") from error
    return list(ids)


def _check_text(text: str, what: str = "prompt") -> None:
    """Refuse lone surrogates, as which Python reads bytes of a command line or of stdin that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{what}: character {error.start + 1} is not valid UTF-8") from error


class StopStrings:
    """A stop criterion for decoding: the text ends with the token that completes one of the strings.

    Args:
        tokenizer: The model's tokenizer.
        strings: The stop strings, or the only one; none of them empty.

    Raises:
        InvalidInputError: There is no string, or one is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: str | Iterable[str]) -> None:
        strings = (strings,) if isinstance(strings, str) else tuple(strings)
        for string in strings:
            instance("stop string", string, str)
            _check_text(string, "stop string")
        if not strings or not all(strings):
            raise InvalidInputError("stop strings: expected at least one, none of them empty")
        if not hasattr(tokenizer, "decode"):
            raise InvalidInputError(f"tokenizer: expected the model's, got {shown(tokenizer)}")
        self._tokenizer = tokenizer
        self._strings = strings
        # A token gives at least one byte of text, so this many at the end cover a match that the newest completes.
        self._tail = max(len(s.encode()) for s in strings) + _MARGIN

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens has a stop string near its end."""
        text = self._tokenizer.decode(list(tokens[-self._tail :]))
        return any(string in text for string in self._strings)


@dataclass(frozen=True)
class TextSegment:
    """A piece of generated text, in whole characters.

    Args:
        text: The piece, never empty.
        drafted: Whether all of its tokens were drafted and accepted.
    """

    text: str
    drafted: bool


class StreamingDetokenizer:
    """Decode tokens to text one by one. Characters that span tokens come whole; special tokens have no text.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # The last segment's tokens are decoded with the new ones: some tokenizers drop a leading space.
        self._before: list[int] = []
        self._new: list[int] = []
        self._drafted = True

    def put(self, token: int, drafted: bool) -> list[TextSegment]:
        """Add the next token, and return the text that it completes, if any.

        Args:
            token: Its id.
            drafted: Whether it was drafted and accepted.
        """
        self._new.append(token)
        self._drafted &= drafted
        text = self._text()
        return [] if not text or text.endswith(_UNFINISHED) else self._taken(text)

    def end(self) -> list[TextSegment]:
        """Return the rest after the last token: a character without its last bytes, or nothing."""
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
