"""A growing text, and where each run of its tokens occurred last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of all runs that the text ends with, so many states are told of each occurrence, longest runs first: in a text that
# repeats one token there are as many as tokens. The others keep an earlier occurrence.
_TOLD = 64


@dataclass(frozen=True)
class Match:
    """A run of tokens that occurs in a text.

    Args:
        length: Of the run; 0 is no match.
        end: Where in the text its last occurrence ends, and what follows it begins.
    """

    length: int
    end: int


class SuffixAutomaton:
    """A growing text, of which the longest run at its end that occurred before is known, however long that is.

    Each state stands for runs that occur at the same places; they are suffixes of the longest of them. A token is added
    in constant time on average.

    Source: Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985).

    Attributes:
        text: The tokens so far.
        match: The longest run at the end of the text that occurred before, where it did so last.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.match = Match(0, 0)
        self._whole = 0  # the state of the text itself; state 0 is that of the empty run
        # By state:
        self._length = [0]  # of the longest run
        self._end = [0]  # where it occurred last
        self._suffix = [-1]  # the state of its longest suffix that occurs at other places, too
        self._following: list[dict[int, int]] = [{}]  # by a token, the state of the runs with that token after them

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        for token in tokens:
            self._tell_ends()
            self._append(token)

    def match_after(self, tokens: Sequence[int]) -> Match:
        """The longest run at the end of the text and further tokens, at least one, that occurs in the text itself."""
        self._tell_ends()
        state, length = self._walked(self._whole, len(self.text), tokens)
        return Match(length, self._end[state])

    def reader(self) -> Reader:
        """What finds the runs of another text in this one, which must not grow any more."""
        return Reader(self)

    def _walked(self, state: int, length: int, tokens: Sequence[int]) -> tuple[int, int]:
        """The state and the length of the longest run that is left of one, with further tokens at its end."""
        for token in tokens:
            while state and token not in self._following[state]:
                state = self._suffix[state]
                length = self._length[state]
            if token in self._following[state]:
                state = self._following[state][token]
                length += 1
        return state, length

    def _tell_ends(self) -> None:
        """Tell the runs that the text ends with that they occur there: something is about to follow them."""
        state = self._suffix[self._whole]
        for _ in range(_TOLD):
            if state <= 0 or self._end[state] == len(self.text):
                return
            self._end[state] = len(self.text)
            state = self._suffix[state]

    def _append(self, token: int) -> None:
        self.text.append(token)
        whole = self._new_state(len(self.text), len(self.text), 0, {})
        state = self._whole
        while state >= 0 and token not in self._following[state]:
            self._following[state][token] = whole
            state = self._suffix[state]
        if state >= 0:
            self._suffix[whole] = self._exactly_after(state, token)
        self._whole = whole
        before = self._suffix[whole]
        self.match = Match(self._length[before], self._end[before])

    def _exactly_after(self, state: int, token: int) -> int:
        """The state whose longest run is that of ``state`` and the token; split off from a longer one if need be."""
        found, length = self._following[state][token], self._length[state] + 1
        if self._length[found] == length:
            return found
        split = self._new_state(length, self._end[found], self._suffix[found], dict(self._following[found]))
        self._suffix[found] = split
        while state >= 0 and self._following[state].get(token) == found:
            self._following[state][token] = split
            state = self._suffix[state]
        return split

    def _new_state(self, length: int, end: int, suffix: int, following: dict[int, int]) -> int:
        self._length.append(length)
        self._end.append(end)
        self._suffix.append(suffix)
        self._following.append(following)
        return len(self._length) - 1


class Reader:
    """The longest run at the end of one text, which grows, that occurs in another one.

    Args:
        other: The other text.
    """

    def __init__(self, other: SuffixAutomaton) -> None:
        self._other = other
        self._state = self._length = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        self._state, self._length = self._other._walked(self._state, self._length, tokens)

    def match_after(self, tokens: Sequence[int] = ()) -> Match:
        """The run at the end of the text and further tokens, where it occurred last in the other text."""
        state, length = self._other._walked(self._state, self._length, tokens)
        return Match(length, self._other._end[state])
