"""Checks of values that users give: each is what it should be, or one line says what was expected."""

from __future__ import annotations

from operator import index
from typing import Any

from layerskip.errors import InvalidInputError

_MOST_SHOWN = 60


def shown(value: object) -> str:
    """A value in one short line."""
    text = " ".join(f"the class {value.__name__}".split() if isinstance(value, type) else repr(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…"


def whole_number(name: str, value: Any) -> int:
    """A whole number, of Python's, numpy's or torch's types.

    Raises:
        InvalidInputError: It is none.
    """
    try:
        return index(value)
    except (TypeError, RuntimeError) as error:
        raise InvalidInputError(f"{name}: expected a whole number, got {shown(value)}") from error


def real_number(name: str, value: Any) -> float:
    """A number, of Python's, numpy's or torch's types.

    Raises:
        InvalidInputError: It is none.
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInputError(f"{name}: expected a number, got {shown(value)}") from error


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1; Python's own stay as they are.

    Raises:
        InvalidInputError: It is none.
    """
    converted = real_number(name, value)
    if not 0 <= converted <= 1:
        raise InvalidInputError(f"{name}: expected a number from 0 to 1, got {value}")
    return value if isinstance(value, int | float) else converted


def instance(name: str, value: object, kind: type, hint: str = "") -> None:
    """Make sure that a value is of a class.

    Raises:
        InvalidInputError: It is not. The message has its class, because a value may be as large as a model.
    """
    if not isinstance(value, kind):
        got = shown(value) if isinstance(value, type) else type(value).__name__
        raise InvalidInputError(f"{name}: expected a {kind.__name__}, got {got}{hint}")
