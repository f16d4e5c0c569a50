"""``layerskip apply --interactive``: a conversation on the terminal, or over pipes."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

from rich.style import Style

from cli.common import (
    counted,
    print_json,
    stderr,
    stdout,
)
from cli.decoding import Decoder, described, in_one_line
from layerskip import Chat
from layerskip.chat import Answer
from layerskip.errors import InvalidInputError
from layerskip.tokenizer import TextSegment

_PROMPT = "> "
_COMMANDS = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"
_COMMAND = re.compile(r"/[a-z]+")
_DRAFTED = Style(color="green")


def check_options(
    interactive: bool, *, show_drafted: bool, json: bool, prompts: Path | None, raw: bool, compare: bool
) -> None:
    """Refuse options that make no sense together.

    Raises:
        InvalidInputError: There are such.
    """
    for option, given in (("--prompts", prompts is not None), ("--raw", raw), ("--compare", compare)):
        if interactive and given:
            raise InvalidInputError(f"{option} cannot be had with --interactive; leave one of them out")
    if show_drafted and not interactive:
        raise InvalidInputError("--show-drafted colours the answers of a conversation; add --interactive")
    if show_drafted and json:
        raise InvalidInputError("--show-drafted colours answers, and with --json there are none; leave one of them out")


def converse(decoder: Decoder, first: str | None, *, show_drafted: bool, json: bool) -> None:
    """Answer messages from stdin, one a line, until it ends.

    Args:
        decoder: Says how to decode.
        first: A message to begin with; None waits for one.
        show_drafted: Whether to colour text that was drafted and accepted, where colours can be shown.
        json: Whether to print one object at the end instead of answers as they come.

    Raises:
        InvalidInputError: The model has no chat template.
    """
    conversation = _Conversation(decoder, _writer(show_drafted, json))
    if sys.stdin.isatty():
        stderr.print(_COMMANDS, style="dim")
    for line in _messages(first):
        if not conversation.take(line.strip()):
            break
    if json:
        print_json({"turns": conversation.turns})


class _Conversation:
    """What was said, and what it says to the next line."""

    def __init__(self, decoder: Decoder, write: Callable[[TextSegment], None]) -> None:
        self._decoder = decoder
        self._chat: Chat = decoder.chat()
        self._write = write
        self.turns: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        """Take a line; whether the conversation goes on."""
        if line in ("/quit", "/exit"):
            return False
        if line == "/reset":
            self._chat.reset()
            stderr.print("the conversation is forgotten", style="dim")
        elif _COMMAND.fullmatch(line):
            stderr.print(_COMMANDS if line == "/help" else f"{line}: no such command; {_COMMANDS}", style="dim")
        elif line:
            self._answer(line)
        return True

    def _answer(self, message: str) -> None:
        with _stopping() as stopped:

            def stop(tokens: Sequence[int]) -> bool:
                return stopped() or (self._decoder.stop is not None and self._decoder.stop(tokens))

            try:
                answer = self._written(self._chat.ask(message, stop=stop))
            except InvalidInputError as error:  # too long, for instance: the conversation can go on without it
                stderr.print(f"layerskip: {error}")
                return
            except KeyboardInterrupt:
                stderr.print("\nstopped at once; this message is forgotten", style="dim")
                return
        self._tell(message, answer, stopped())

    def _written(self, segments: Generator[TextSegment, None, Answer]) -> Answer:
        while True:
            try:
                segment = next(segments)
            except StopIteration as end:
                self._write(TextSegment("\n", drafted=False))
                return cast(Answer, end.value)
            self._write(segment)

    def _tell(self, message: str, answer: Answer, stopped: bool) -> None:
        result = described(answer.generation, answer.text, self._decoder.speculative)
        reason = {"finish_reason": "interrupted"} if stopped else {}
        self.turns.append({"message": message, **result, **reason, "forgotten": answer.forgotten})
        notes = ["stopped"] * stopped + ["the model's context is full"] * (result["finish_reason"] == "context")
        stderr.print(" · ".join([in_one_line(result), *notes]), style="dim")
        if answer.forgotten:
            what = counted(answer.forgotten, "oldest exchange")
            stderr.print(f"to fit the model's context, the {what} of the conversation no longer count", style="dim")


def _messages(first: str | None) -> Iterator[str]:
    """Lines to answer; Ctrl-C throws away the one that is being typed."""
    if first is not None:
        yield first
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            stderr.print(f"\n{_COMMANDS}", style="dim")
            continue
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"stdin: not {error.encoding} text") from error
        if line is None:
            return
        yield line


def _read_line() -> str | None:
    """The next line of stdin; None at its end. On a terminal it can be edited, and earlier ones come back."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if sys.stdin.isatty():  # the answers go elsewhere, but who types wants to see that it is their turn
            stderr.print(_PROMPT, end="")
        return sys.stdin.readline() or None
    _line_editing()
    try:
        return input(_PROMPT)
    except EOFError:
        print()
        return None


def _line_editing() -> None:
    """Where Python was built with readline, importing it is all that input() needs."""
    with suppress(ImportError):
        import readline  # noqa: F401


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """For the enclosed block, the first Ctrl-C is only remembered, and a second one interrupts."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _writer(show_drafted: bool, json: bool) -> Callable[[TextSegment], None]:
    """How pieces of answers are printed."""
    if json:
        return lambda piece: None
    if show_drafted and not _colours():
        stderr.print("--show-drafted: no colours here, on no terminal or with NO_COLOR set", style="dim")
    return _write_in_colour if show_drafted and _colours() else _write


def _colours() -> bool:
    return stdout.is_terminal and stdout.color_system is not None and not stdout.no_color


def _write(piece: TextSegment) -> None:
    print(piece.text, end="", flush=True)


def _write_in_colour(piece: TextSegment) -> None:
    print(_DRAFTED.render(piece.text) if piece.drafted else piece.text, end="", flush=True)
