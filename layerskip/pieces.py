"""Text as it comes, token by token, and which of it was drafted."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# What decoding puts in place of a character whose last bytes are still to come.
_UNFINISHED = "�"


@dataclass(frozen=True)
class Piece:
    """A part of a text, of whole characters.

    Args:
        text: The part, never empty.
        drafted: Whether all of its tokens were drafted, and accepted.
    """

    text: str
    drafted: bool


class Pieces:
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

    def put(self, token: int, drafted: bool) -> list[Piece]:
        """Take the next token; the text that is whole with it, if any.

        Args:
            token: Its id.
            drafted: Whether it was drafted, and accepted.
        """
        self._new.append(token)
        self._drafted &= drafted
        text = self._text()
        return [] if not text or text.endswith(_UNFINISHED) else self._taken(text)

    def end(self) -> list[Piece]:
        """What is left when no token follows: a character without its last bytes, or nothing."""
        text = self._text()
        return self._taken(text) if text else []

    def _text(self) -> str:
        """The text of the new tokens."""
        return self._decode(self._before + self._new)[len(self._decode(self._before)) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _taken(self, text: str) -> list[Piece]:
        piece = Piece(text, self._drafted)
        self._before, self._new, self._drafted = self._new, [], True
        return [piece]
