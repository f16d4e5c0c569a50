"""What drafting with heads costs."""

import pytest

from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.heads import HEAD_KINDS
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine
from search.head_costs import HeadCosts, measure_head_costs
from tests.models import random_heads, random_prefix

HEADS = 3


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_drafts_of_every_length_are_timed(tiny, kind):
    costs = measure_head_costs(EagerEngine(tiny), DraftWeights(heads=random_heads(tiny, kind, HEADS)))
    assert costs.base > 0
    assert len(costs.places) == HEADS
    assert all(len(place) == len(costs.ways) for place in costs.places)
    assert costs.seconds([1, 2, 3]) > costs.base


def test_seconds_between_measured_numbers_of_tokens_are_interpolated():
    costs = HeadCosts(1.0, [[0.5, 0.5], [2.0, 4.0]], [1, 3])
    assert costs.seconds([]) == 1.0
    assert costs.seconds([1]) == 1.5
    assert costs.seconds([1, 2]) == 4.5


def test_the_layer_before_heads_is_timed_with_every_draft_after_a_text_of_usual_length(llama, monkeypatch):
    seen, run = [], DraftLayer.__call__

    def watched(self, x, context):
        seen.append((x.shape[1], context.cache.length))
        return run(self, x, context)

    monkeypatch.setattr(DraftLayer, "__call__", watched)
    weights = DraftWeights(layers=[random_prefix(llama)], heads=random_heads(llama, "hydra", 2))
    ways = measure_head_costs(EagerEngine(llama), weights).ways
    first, rest = seen[: len(ways)], seen[len(ways) :]
    assert first == [(130, 0)] * len(ways)
    assert {width for width, _ in rest} == {2}
    assert len(seen) == len(ways) * 2 * 12  # two lengths, in every repeat and the one that is not counted
    assert min(past for _, past in rest) >= 128
