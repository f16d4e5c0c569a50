"""A growing text, and where each run of its tokens occurred last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Match:
    """A run of tokens that occurs in a text.

    Args:
        length: Of the run; 0 is no match.
        end: Where in the text its last occurrence ends, and what follows it begins.
    """

    length: int
    end: int


@dataclass(slots=True, eq=False, repr=False)
class _State:
    """All runs that occur at the same places of the text; each is an end of the longest of them.

    Args:
        length: Of the longest of the runs.
        end: Where their last occurrence ends.
        shorter: The state of their longest common end that occurs at other places, too; None for the empty run.
        following: By a token, the state of these runs with that token after them.
    """

    length: int
    end: int
    shorter: _State | None
    following: dict[int, _State] = field(default_factory=dict)


class SuffixAutomaton:
    """A growing text, of which the longest run at its end that occurred before is known, however long that is.

    A token is added in constant time on average, but for the marks of where runs occurred last.

    Source: Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985).

    Attributes:
        text: The tokens so far.
        match: The longest run at the end of the text that occurred before, where it did so last.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.match = Match(0, 0)
        self._empty = self._whole = _State(0, 0, None)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        for token in tokens:
            self._mark_ends()
            self._append(token)

    def match_after(self, tokens: Sequence[int]) -> Match:
        """The longest run at the end of the text and further tokens, at least one, that occurs in the text itself."""
        self._mark_ends()
        state, length = self._whole, len(self.text)
        for token in tokens:
            while token not in state.following and state.shorter is not None:
                state = state.shorter
                length = state.length
            if token in state.following:
                state = state.following[token]
                length += 1
        return Match(length, state.end)

    def _mark_ends(self) -> None:
        """Note of every run that the text ends with that it occurs there: something is about to follow it."""
        state = self._whole.shorter
        while state is not None and state.end < len(self.text):
            state.end = len(self.text)
            state = state.shorter

    def _append(self, token: int) -> None:
        self.text.append(token)
        whole = _State(len(self.text), len(self.text), self._empty)
        state: _State | None = self._whole
        while state is not None and token not in state.following:
            state.following[token] = whole
            state = state.shorter
        if state is not None:
            whole.shorter = self._exactly_after(state, token)
        self._whole = whole
        assert whole.shorter is not None
        self.match = Match(whole.shorter.length, whole.shorter.end)

    def _exactly_after(self, state: _State, token: int) -> _State:
        """The state whose longest run is that of ``state`` and the token; split off from a longer one if need be."""
        found = state.following[token]
        if found.length == state.length + 1:
            return found
        split = _State(state.length + 1, found.end, found.shorter, dict(found.following))
        found.shorter = split
        before: _State | None = state
        while before is not None and before.following.get(token) is found:
            before.following[token] = split
            before = before.shorter
        return split
