"""Token trees: which drafted token follows which. A chain is a tree without branches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from layerskip.errors import InvalidInputError
from layerskip.utils import numbers_to

# Caches have room for this many tokens in addition to the longest path of a tree.
MOST_LEAVES = 64

# Number of tokens of a draft in its first place, in its second, and so on: one number where they all follow the first
# token of the place before, several where they follow each of its tokens in turn.
Branches = Sequence[int | Sequence[int]]


@dataclass(frozen=True)
class TokenTree:
    """The rows of a verification: row 0 is the text's newest token, row ``i + 1`` is drafted token ``i``.

    Args:
        parents: For each drafted token the row that it follows, always an earlier one. Rows that follow the same one
            are siblings; their order is that in which they were drawn.
    """

    parents: tuple[int, ...] = ()

    @classmethod
    def chain(cls, length: int) -> TokenTree:
        """Each token follows the one before."""
        return cls(tuple(range(length)))

    @classmethod
    def comb(cls, widths: Iterable[int]) -> TokenTree:
        """A chain with leaves: at each depth ``widths`` siblings, of which only the first is followed by others.

        The rows of the chain come first, and after them the leaves, by depth.
        """
        widths = tuple(widths)
        leaves = [row for row, width in enumerate(widths) for _ in range(width - 1)]
        return cls((*range(len(widths)), *leaves))

    @classmethod
    def grown(cls, widths: Iterable[Sequence[int]]) -> TokenTree:
        """A tree place by place: how many tokens follow each token of the place before; missing numbers are 0."""
        parents: list[int] = []
        rows = [0]
        for place in widths:
            following = [row for row, width in zip(rows, place, strict=False) for _ in range(width)]
            rows = [len(parents) + number for number in range(1, len(following) + 1)]
            parents += following
        return cls(tuple(parents))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """For each row its distance from the newest token."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return max(self.depths)

    @cached_property
    def is_chain(self) -> bool:
        """Whether nothing branches."""
        return self.parents == tuple(range(len(self.parents)))

    @cached_property
    def children(self) -> dict[int, tuple[int, ...]]:
        """The rows that follow a row, for each row that any follows, in order."""
        children: dict[int, tuple[int, ...]] = {}
        for row, parent in enumerate(self.parents, start=1):
            children[parent] = (*children.get(parent, ()), row)
        return dict(sorted(children.items()))

    @cached_property
    def main_path(self) -> tuple[int, ...]:
        """The rows from row 0 on through the first that follows each, in order."""
        rows = [0]
        while rows[-1] in self.children:
            rows.append(self.children[rows[-1]][0])
        return tuple(rows)

    def continued(self, length: int) -> TokenTree:
        """The same with a chain of so many further rows after the main path."""
        first = len(self.parents) + 1
        chain = (self.main_path[-1], *range(first, first + length))
        return TokenTree((*self.parents, *chain[:length]))

    def padded(self, rows: int) -> TokenTree:
        """The same with further rows, ``rows`` in all, that nothing follows."""
        return TokenTree((*self.parents, *(0,) * (rows - 1 - len(self.parents))))

    def follow(self, drafted: Sequence[int], choices: Sequence[int]) -> tuple[int, ...]:
        """The rows that the text runs through, from row 0 on, while the token chosen after a row was drafted there.

        Args:
            drafted: The drafted tokens.
            choices: For each row the token that is chosen to follow it.
        """
        rows = [0]
        while True:
            following = self.children.get(rows[-1], ())
            accepted = [row for row in following if drafted[row - 1] == choices[rows[-1]]]
            if not accepted:
                return tuple(rows)
            rows.append(accepted[0])


def widths_of(branches: Branches) -> tuple[tuple[int, ...], ...]:
    """Branches with a row of numbers for every place.

    Raises:
        InvalidInputError: A place has no token after the first one of the place before, more numbers than that place
            has tokens, or there are more tokens than caches have room for.
    """
    widths = tuple((place,) if isinstance(place, int) else tuple(place) for place in branches)
    before = 1
    for number, place in enumerate(widths, start=1):
        if not place or place[0] < 1 or min(place) < 0:
            raise InvalidInputError(
                f"place {number} of the tree: expected at least 1, or a list that may hold 0 after its first number, "
                f"got {_shown(place)}"
            )
        if len(place) > before:
            raise InvalidInputError(
                f"place {number} of the tree: has {len(place)} numbers, but follows {before} token{'s' * (before > 1)}"
            )
        before = sum(place)
    if sum(map(sum, widths)) - len(widths) > MOST_LEAVES:
        raise InvalidInputError(f"tree: expected at most {MOST_LEAVES} tokens besides the first of each place")
    return widths


def branches_of(widths: Iterable[Sequence[int]]) -> tuple[int | tuple[int, ...], ...]:
    """The inverse of :func:`widths_of`, in the shortest form."""
    short: list[int | tuple[int, ...]] = []
    for place in widths:
        row = list(place)
        while len(row) > 1 and not row[-1]:
            row.pop()
        short.append(row[0] if len(row) == 1 else tuple(row))
    return tuple(short)


def describe_branches(branches: Branches) -> str:
    """Human-readable branches, such as ``4-2-1``, or ``4-2+1-1`` where two tokens are followed by others."""
    return "-".join(_shown((place,) if isinstance(place, int) else place) for place in branches)


def _shown(place: Sequence[int]) -> str:
    return "+".join(map(str, place)) or "an empty list"


@lru_cache(maxsize=256)
def numbers_on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers as a tensor that stays on its device: copying them there makes the host wait."""
    return numbers_to(device, numbers)


@lru_cache(maxsize=256)
def ancestors_on(tree: TokenTree, device: torch.device) -> Tensor:
    """The ancestors of each row, itself included: ``[rows, rows]``, booleans."""
    rows = len(tree.parents) + 1
    ancestors = torch.eye(rows, dtype=torch.bool)
    for row, parent in enumerate(tree.parents, start=1):
        ancestors[row] |= ancestors[parent]
    return ancestors.to(device)


@lru_cache(maxsize=256)
def siblings_on(tree: TokenTree, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The drafted tokens after each of the ``n`` rows that any follow.

    Returns:
        The rows, ``[n]``; indices of drafted tokens, ``[n, most siblings]``; and which of them exist: where a row has
        fewer siblings the first one fills their places.
    """
    most = max(map(len, tree.children.values()))
    indices = [[row - 1 for row in rows] + [rows[0] - 1] * (most - len(rows)) for rows in tree.children.values()]
    exists = [[number < len(rows) for number in range(most)] for rows in tree.children.values()]
    rows = torch.tensor(list(tree.children), device=device)
    return rows, torch.tensor(indices, device=device), torch.tensor(exists, device=device)
