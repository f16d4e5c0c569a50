"""Skipping what changes the hidden states least."""

import pytest
import torch

from search.starting_skip_sets import block_influence, least_change
from tests.search.starts.conftest import IDLE, LAYERS


def test_a_sublayer_that_does_nothing_has_no_influence(partly_idle):
    influence = block_influence(partly_idle.states)
    assert len(influence) == 2 * LAYERS
    assert [index for index, change in enumerate(influence) if change < 1e-5] == list(IDLE)


def test_turning_every_state_around_is_the_most_influence():
    x = torch.randn(5, 8)
    # The second sublayer changes a state's length, which norms undo.
    assert block_influence(torch.stack([x, -x, -3 * x])) == pytest.approx([2, 0], abs=1e-6)


def test_the_sublayers_of_least_influence_are_skipped_first(partly_idle):
    skipped = [skip_set for _, skip_set in least_change(partly_idle.states)]
    sizes = [len(skip_set) for skip_set in skipped]
    assert sizes == sorted(set(sizes))
    influence = block_influence(partly_idle.states)
    for skip_set in skipped:
        kept = [influence[index] for index in skip_set.kept]
        left_out = [change for change, skip in zip(influence, skip_set.mask, strict=True) if skip]
        assert max(left_out) <= min(kept)
