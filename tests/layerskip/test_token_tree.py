"""The shape of a draft."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip.token_tree import (
    TokenTree,
    ancestors_on,
    branches_of,
    describe_branches,
    numbers_on,
    siblings_on,
    widths_of,
)
from tests.strategies import bushes, trees

CPU = torch.device("cpu")
COMB = TokenTree.comb((3, 1, 2))  # 0 - 1 - 2 - 3, with 4 and 5 beside 1, and 6 beside 3


def path_to(tree, row):
    return [row] if row == 0 else [*path_to(tree, tree.parents[row - 1]), row]


@given(trees())
def test_a_row_comes_from_the_rows_on_its_path_alone(tree):
    comes_from, depths = ancestors_on(tree, CPU), numbers_on(tree.depths, CPU)
    for row in range(len(tree.parents) + 1):
        assert comes_from[row].nonzero()[:, 0].tolist() == path_to(tree, row)
        assert depths[row] == len(path_to(tree, row)) - 1
    assert tree.depth == max(depths.tolist())


@given(st.integers(0, 8))
def test_a_chain_is_a_tree_without_branches(length):
    chain = TokenTree.chain(length)
    assert chain == TokenTree.comb([1] * length)
    assert chain.is_chain
    assert chain.depth == length
    assert torch.equal(ancestors_on(chain, CPU), torch.ones(length + 1, length + 1, dtype=torch.bool).tril())


def test_a_comb_is_a_chain_with_leaves_behind_its_rows():
    assert COMB.parents == (0, 1, 2, 0, 0, 2)
    assert COMB.children == {0: (1, 4, 5), 1: (2,), 2: (3, 6)}
    assert not COMB.is_chain


@given(trees(), st.data())
def test_the_text_runs_along_the_longest_path_of_chosen_tokens(tree, data):
    few = st.integers(0, 2)
    drafted = [data.draw(few) for _ in tree.parents]
    choices = [data.draw(few) for _ in range(len(tree.parents) + 1)]
    rows = tree.follow(drafted, choices)
    assert list(rows) == path_to(tree, rows[-1])
    for before, row in pairwise(rows):
        assert drafted[row - 1] == choices[before]
    assert not [row for row in tree.children.get(rows[-1], ()) if drafted[row - 1] == choices[rows[-1]]]


@given(trees(), st.integers(0, 4))
def test_padding_changes_no_row(tree, more):
    rows = len(tree.parents) + 1
    padded = tree.padded(rows + more)
    assert padded.parents[: rows - 1] == tree.parents
    assert torch.equal(ancestors_on(padded, CPU)[:rows, :rows], ancestors_on(tree, CPU))
    assert not ancestors_on(padded, CPU)[:rows, rows:].any()


def test_a_tree_grows_place_by_place_behind_any_of_its_tokens():
    tree = TokenTree.grown([[3], [2, 0, 1], [0, 1, 1]])
    assert tree.parents == (0, 0, 0, 1, 1, 3, 5, 6)
    assert tree.depths == (0, 1, 1, 1, 2, 2, 2, 3, 3)
    assert TokenTree.grown([]) == TokenTree()


@given(bushes())
def test_branches_are_the_shortest_way_to_write_how_many_follow_each_token(branches):
    widths = widths_of(branches)
    assert branches_of(widths) == branches
    assert branches_of([*row, 0, 0] for row in widths) == branches
    assert TokenTree.grown(widths).depth == len(branches)


def test_branches_are_told_with_a_plus_between_the_tokens_of_a_place():
    assert describe_branches((4, (2, 1), 1)) == "4-2+1-1"


def test_siblings_are_given_in_order_and_gaps_are_marked():
    rows, tokens, there = siblings_on(COMB, CPU)
    assert rows.tolist() == [0, 1, 2]
    assert tokens.tolist() == [[0, 3, 4], [1, 1, 1], [2, 5, 2]]
    assert there.tolist() == [[True, True, True], [True, False, False], [True, True, False]]


@pytest.mark.parametrize("widths", [(), (1,), (4, 2)])
def test_a_comb_has_as_many_tokens_as_its_widths_say(widths):
    assert len(TokenTree.comb(widths).parents) == sum(widths)
    assert TokenTree.comb(widths).depth == len(widths)
