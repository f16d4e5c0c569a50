"""The cache does what a plain list of positions would do."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from layerskip.kv_cache import KVCache

LAYERS, HEADS, DIM = 3, 2, 4
GAP = None  # a position that a draft has left out of a layer


def content(numbers):
    """Keys that say which number they stand for, ``[1, heads, n, dim]``."""
    return torch.tensor(numbers, dtype=torch.float32)[None, None, :, None].expand(1, HEADS, -1, DIM)


class CacheAgainstLists(RuleBasedStateMachine):
    """Passes and rollbacks in any order; beside the cache, a list of numbers for every layer."""

    @initialize(capacity=st.integers(0, 6))
    def start(self, capacity):
        self.cache = KVCache(LAYERS, capacity)
        self.lists = [[] for _ in range(LAYERS)]
        self.next_number = 1

    @rule(width=st.integers(1, 5), ran=st.sets(st.integers(0, LAYERS - 1)))
    def run_a_pass(self, width, ran):
        numbers = list(range(self.next_number, self.next_number + width))
        self.next_number += width
        self.cache.reserve(width)
        for layer in range(LAYERS):
            self.lists[layer] += numbers if layer in ran else [GAP] * width
        for layer in ran:
            # transformers passes on what its attention was called with, from 5.24 on.
            keys, values = self.cache.update(content(numbers), -content(numbers), layer, kwargs={"use_cache": True})
            self.assert_holds(keys, self.lists[layer])
            self.assert_holds(-values, self.lists[layer])
        self.cache.advance(width)

    @rule(data=st.data())
    def roll_back(self, data):
        length = data.draw(st.integers(0, self.cache.length))
        self.cache.rollback(length)
        for numbers in self.lists:
            del numbers[length:]

    @rule(positions=st.integers(0, 20))
    def reserve(self, positions):
        self.cache.reserve(positions)
        assert self.cache.capacity >= self.cache.length + positions

    @invariant()
    def the_length_is_that_of_the_lists(self):
        if hasattr(self, "cache"):
            assert {len(numbers) for numbers in self.lists} == {self.cache.length}
            assert self.cache.capacity >= self.cache.length

    def assert_holds(self, tensor, numbers):
        assert tensor.shape == (1, HEADS, len(numbers), DIM)
        written = [i for i, number in enumerate(numbers) if number is not GAP]
        assert torch.equal(tensor[:, :, written], content([numbers[i] for i in written]))


CacheAgainstLists.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
test_the_cache_behaves_like_a_list_for_every_layer = CacheAgainstLists.TestCase


@pytest.mark.parametrize("length", [-1, 4])
def test_rolling_back_to_a_length_that_never_was_is_refused(length):
    cache = KVCache(1, 8)
    cache.advance(3)
    with pytest.raises(ValueError, match=f"cannot roll back to length {length}: the cache holds 3 positions"):
        cache.rollback(length)
    assert cache.length == 3


def test_growing_at_least_doubles_so_that_it_is_rare():
    cache = KVCache(1, 8)
    cache.advance(8)
    cache.reserve(1)
    assert cache.capacity == 16


def test_what_fits_does_not_grow():
    cache = KVCache(1, 8)
    cache.advance(5)
    cache.reserve(3)
    assert cache.capacity == 8


def test_the_bytes_are_those_of_the_layers_that_were_written():
    cache = KVCache(LAYERS, 10)
    assert cache.nbytes == 0
    cache.update(content([1]), content([1]), 1)
    assert cache.nbytes == 2 * HEADS * 10 * DIM * 4
