"""A tree is verified in one pass: each of its tokens gets the logits that a pass over its own path would give it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import LayerSkipModel
from layerskip.engine import EagerEngine, GraphEngine, PassCosts
from layerskip.token_tree import TokenTree
from tests.capture import like_a_graph
from tests.models import EVERY_FAMILY, LAYERS, VOCABULARY
from tests.strategies import tokens, trees

BUSHY = TokenTree((0, 0, 1, 1, 2, 3, 3, 0))
WIDE_IS_CHEAP = PassCosts({width: 40.0 - width for width in range(1, 25)}, dict.fromkeys(range(1, 25), 1.0))


def path_to(tree, row):
    return [] if row == 0 else [*path_to(tree, tree.parents[row - 1]), row]


@torch.inference_mode()
def by_path(model, text, drafted, tree):
    """The logits of every row, each from a pass over the text and its path."""
    logits = []
    for row in range(len(drafted)):
        path = [drafted[0], *(drafted[each] for each in path_to(tree, row))]
        ids = torch.tensor([*text, *path])
        logits.append(model.logits(model.forward(ids, model.new_cache(len(ids)))[:, -1:])[0])
    return torch.stack(logits)


@torch.inference_mode()
def in_one_pass(engine, text, drafted, tree):
    cache = engine.new_cache(len(text) + len(drafted))
    engine.prefill(torch.tensor(text), cache)
    scored = engine.verify(torch.tensor(drafted), cache, tree=tree)
    return scored, cache


def some_tokens(count):
    return [(7 * number + 3) % VOCABULARY for number in range(count)]


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_row_of_every_family_gets_the_logits_of_its_own_path(family, captured):
    """Windows are shorter than the text, and end inside the tree."""
    model = LayerSkipModel(EVERY_FAMILY[family]())
    engine = GraphEngine(model, like_a_graph, smallest_bucket=8) if captured else EagerEngine(model)
    drafted = some_tokens(len(BUSHY.parents) + 1)
    for text in ([5], some_tokens(4), some_tokens(11)):
        scored, _ = in_one_pass(engine, text, drafted, BUSHY)
        torch.testing.assert_close(scored.logits, by_path(model, text, drafted, BUSHY), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("costs", [None, WIDE_IS_CHEAP], ids=["exact", "padded"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@given(data=st.data(), text=tokens(12), tree=trees())
@settings(max_examples=15)
def test_a_tree_of_any_shape_is_verified_row_by_row(tiny, captured, costs, data, text, tree):
    engine = GraphEngine(tiny, like_a_graph, smallest_bucket=8) if captured else EagerEngine(tiny)
    engine.costs = costs
    rows = len(tree.parents) + 1
    drafted = data.draw(tokens(rows, min_size=rows))
    scored, cache = in_one_pass(engine, text, drafted, tree)
    assert cache.length == len(text) + rows
    torch.testing.assert_close(scored.logits, by_path(tiny, text, drafted, tree), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(tiny.logits(scored.states[None]), scored.logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@given(data=st.data(), text=tokens(8), tree=trees())
@settings(max_examples=15)
def test_what_is_kept_of_a_tree_are_the_keys_and_values_of_its_path(tiny, captured, data, text, tree):
    engine = GraphEngine(tiny, like_a_graph, smallest_bucket=8) if captured else EagerEngine(tiny)
    drafted = some_tokens(len(tree.parents) + 1)
    path = [0, *path_to(tree, data.draw(st.integers(0, len(tree.parents))))]
    _, cache = in_one_pass(engine, text, drafted, tree)
    with torch.inference_mode():
        cache.compact(len(text), path)
    ids = torch.tensor([*text, *(drafted[row] for row in path)])
    expected = tiny.new_cache(len(ids))
    with torch.inference_mode():
        tiny.forward(ids, expected)
    assert cache.length == expected.length
    for layer in range(LAYERS):
        for ours, theirs in zip(cache.layer(layer), expected.layer(layer), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
