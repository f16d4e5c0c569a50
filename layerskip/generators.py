"""Looping over generators that also return something."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

Yielded = TypeVar("Yielded")
Returned = TypeVar("Returned")


class Drained(Generic[Yielded, Returned]):
    """A generator to loop over once, which a ``for`` leaves without what it returned at its end.

    Args:
        generator: The generator.

    Attributes:
        returned: What it returned, once the loop is over.
    """

    returned: Returned

    def __init__(self, generator: Generator[Yielded, None, Returned]) -> None:
        self._generator = generator

    def __iter__(self) -> Iterator[Yielded]:
        self.returned = yield from self._generator
