"""Keys and values at fixed addresses: written by position, read by bucket, and moved together."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip.engine.graph_cache import GraphCache
from layerskip.kv_cache import KVCache

LAYERS, HEADS, DIM = 3, 2, 4


def entries(layer, positions):
    """Keys and values that tell their layer and position."""
    positions = torch.as_tensor(positions, dtype=torch.float32)
    keys = (100 * layer + positions)[None, None, :, None].expand(1, HEADS, -1, DIM)
    return keys, -keys


def filled(cache, length):
    for layer in range(LAYERS):
        cache.update(*entries(layer, range(length)), layer)
    cache.advance(length)
    return cache


@given(st.integers(0, 5), st.sets(st.integers(1, 6)).map(lambda rows: (0, *sorted(rows))))
def test_a_path_of_a_tree_is_kept_as_in_an_ordinary_cache(past, rows):
    caches = [filled(kind(LAYERS, 16), past + 7) for kind in (GraphCache, KVCache)]
    for cache in caches:
        cache.compact(past, rows)
    ours, ordinary = caches
    assert ours.length == ordinary.length == past + len(rows)
    for layer in range(LAYERS):
        for own, expected in zip(ours.layer(layer), ordinary.layer(layer), strict=True):
            assert torch.equal(own, expected)


def test_a_path_is_moved_in_few_operations_whatever_the_number_of_layers():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func._schema.name in ("aten::index_select", "aten::copy_")
            return func(*args, **(kwargs or {}))

    cache = filled(GraphCache(LAYERS, 16), 9)
    cache.compact(2, (0, 3, 4))  # makes the indices
    cache = filled(GraphCache(LAYERS, 16), 9)
    with Calls() as calls:
        cache.compact(2, (0, 3, 4))
    assert calls.count == 2


def test_a_captured_pass_writes_at_its_positions_and_reads_its_bucket():
    cache = filled(GraphCache(LAYERS, 16), 3)
    with cache.at(torch.tensor([3, 4]), 8):
        keys, values = cache.update(*entries(1, [3, 4]), 1)
    assert keys.shape == values.shape == (1, HEADS, 8, DIM)
    assert keys[0, 0, :, 0].tolist() == [100, 101, 102, 103, 104, 0, 0, 0]
    assert cache.length == 3


def test_positions_that_were_verified_are_written_in_a_drafts_own_slots_alone():
    cache = filled(GraphCache(LAYERS, 16), 3)
    with cache.at(torch.tensor([2, 3]), 8, known=1):
        keys, _ = cache.update(*entries(7, [2, 3]), 0)
        own, _ = cache.update(*entries(7, [2, 3]), LAYERS)
    assert keys[0, 0, :4, 0].tolist() == [0, 1, 2, 703]
    assert own[0, 0, :4, 0].tolist() == [0, 0, 702, 703]


def test_layers_of_another_shape_have_memory_of_their_own_and_are_moved_too():
    cache = GraphCache(2, 8)
    for layer, dim in ((0, 4), (1, 6)):
        keys = torch.arange(5.0)[None, None, :, None].expand(1, HEADS, -1, dim)
        cache.update(keys, keys, layer)
    cache.advance(5)
    cache.compact(1, (0, 2))
    for layer in range(2):
        for held in cache.layer(layer):
            assert held[0, 0, :, 0].tolist() == [0, 1, 3]


def test_a_cache_that_grows_holds_what_it_held_in_one_memory_again():
    cache = GraphCache(LAYERS, 8)
    for layer in range(LAYERS + 1):  # the last is a draft layer's
        cache.update(*entries(layer, range(6)), layer)
    cache.advance(6)
    cache.reserve(3)
    assert cache.capacity == 16
    for layer in range(LAYERS):
        for held, expected in zip(cache.layer(layer), entries(layer, range(6)), strict=True):
            assert torch.equal(held, expected)
            assert held.untyped_storage().data_ptr() == cache._store_address
    assert cache.layer(LAYERS)[0].untyped_storage().data_ptr() != cache._store_address
