"""The conversation of ``layerskip apply --interactive``, on the terminal or over pipes."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, cast

from rich.style import Style

from cli.common import counted, describe_generation, generation_line, print_json, stderr, stdout
from layerskip import Chat, StopStrings
from layerskip.chat import Answer
from layerskip.errors import InvalidInputError
from layerskip.tokenizer import TextSegment, text_of

_PROMPT = "> "
_COMMANDS = "/reset clears the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"
_COMMAND = re.compile(r"/[a-z]+")
_DRAFTED = Style(color="green")


def converse(
    chat: Chat, first: str | None, stop: StopStrings | None, *, speculative: bool, show_drafted: bool, json: bool
) -> None:
    """Answer messages from stdin, one per line, until it ends.

    Args:
        chat: The conversation with the model.
        first: The first message; None reads it from stdin like the others.
        stop: Ends answers.
        speculative: Whether the conversation drafts.
        show_drafted: Whether to colour text that was drafted and accepted, where the terminal can.
        json: Whether to print one object at the end instead of answers as they are generated.
    """
    if sys.stdin is None:
        raise InvalidInputError("stdin: is closed; a conversation reads its messages there")
    session = _Session(chat, stop, speculative, _writer(show_drafted, json))
    if sys.stdin.isatty():
        stderr.print(_COMMANDS, style="dim")
    for line in _messages(first):
        if not session.take(text_of(line)):
            break
    if json:
        print_json({"turns": session.turns})


class _Session:
    """A conversation that is driven by lines of text: messages and commands."""

    def __init__(
        self, chat: Chat, stop: StopStrings | None, speculative: bool, write: Callable[[TextSegment], None]
    ) -> None:
        self._chat = chat
        self._stop = stop
        self._speculative = speculative
        self._write = write
        self.turns: list[dict[str, Any]] = []

    def take(self, line: str) -> bool:
        """Answer a message or run a command; return whether the conversation continues."""
        command = line.strip()
        if command in ("/quit", "/exit"):
            return False
        if command == "/reset":
            self._chat.reset()
            stderr.print("conversation cleared", style="dim")
        elif _COMMAND.fullmatch(command):
            stderr.print(_COMMANDS if command == "/help" else f"{command}: unknown command; {_COMMANDS}", style="dim")
        elif command:
            self._answer(line)
        return True

    def _answer(self, message: str) -> None:
        with _first_ctrl_c_noted() as stopped:

            def stop(tokens: Sequence[int]) -> bool:
                return stopped() or (self._stop is not None and self._stop(tokens))

            try:
                answer = self._print(self._chat.ask(message, stop=stop))
            except InvalidInputError as error:  # such as a message that is too long: the conversation can continue
                stderr.print(f"layerskip: {error}")
                return
            except KeyboardInterrupt:
                stderr.print("\ninterrupted; this message is dropped", style="dim")
                return
        self._report(message, answer, stopped())

    def _print(self, segments: Generator[TextSegment, None, Answer]) -> Answer:
        while True:
            try:
                segment = next(segments)
            except StopIteration as end:
                self._write(TextSegment("\n", drafted=False))
                return cast(Answer, end.value)
            self._write(segment)

    def _report(self, message: str, answer: Answer, stopped: bool) -> None:
        result = describe_generation(answer.generation, answer.text, speculative=self._speculative)
        reason = {"finish_reason": "interrupted"} if stopped else {}
        self.turns.append({"message": message, **result, **reason, "forgotten": answer.forgotten})
        notes = ["stopped"] * stopped + ["the model's context is full"] * (result["finish_reason"] == "context")
        stderr.print(" · ".join([generation_line(result), *notes]), style="dim")
        if answer.forgotten:
            exchanges = counted(answer.forgotten, "exchange")
            stderr.print(f"dropped the oldest {exchanges} to fit the model's context", style="dim")


def _messages(first: str | None) -> Iterator[str]:
    """Lines of input; Ctrl-C discards the one that is being typed."""
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
    """The next line of stdin; None at its end. On a terminal, line editing and history work."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        if sys.stdin.isatty():  # answers are redirected, but the user must see that it is their turn
            stderr.print(_PROMPT, end="")
        return sys.stdin.readline() or None
    with suppress(ImportError):  # where Python has readline, importing it is all that input() needs
        import readline  # noqa: F401
    try:
        return input(_PROMPT)
    except EOFError:
        print()
        return None


@contextmanager
def _first_ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Inside the block, the first Ctrl-C only makes the returned function true; a second one interrupts."""
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
    """The function that prints segments of answers."""
    if json:
        return lambda segment: None
    has_colours = stdout.is_terminal and stdout.color_system is not None and not stdout.no_color
    if show_drafted and not has_colours:
        stderr.print("--show-drafted: no colours here, as this is no terminal or NO_COLOR is set", style="dim")
    return _write_in_colour if show_drafted and has_colours else _write


def _write(segment: TextSegment) -> None:
    print(segment.text, end="", flush=True)


def _write_in_colour(segment: TextSegment) -> None:
    print(_DRAFTED.render(segment.text) if segment.drafted else segment.text, end="", flush=True)
