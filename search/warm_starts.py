"""What a search tries first: every family of starts, for one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from search.estimate import Estimator, acceptance
from search.latency import LatencyModel
from search.space import Candidate, SearchSpace
from search.starts import (
    different,
    early_exits,
    evenly_spaced,
    least_change,
    least_damage,
    most_similar_paths,
    nothing_skipped,
    published,
)


def warm_starts(
    model: LayerSkipModel, space: SearchSpace, estimator: Estimator, latency: LatencyModel
) -> Iterator[tuple[str, Candidate]]:
    """Candidates, each with where it comes from.

    Args:
        model: The model.
        space: The choices of the search.
        estimator: Scores single sublayers.
        latency: What sublayers cost.
    """

    def alone(skip_set: SkipSet) -> float:
        return acceptance(next(estimator.traces(model.stack_of(skip_set))))

    costs = _sublayer_costs(space.num_layers, latency)
    text = estimator.versions()
    families = (
        nothing_skipped(space.num_layers),
        evenly_spaced(space.num_layers),
        least_damage(alone, costs),
        least_change(text.states),
        most_similar_paths(text.states, text.run_sublayer, costs),
        early_exits(space.num_layers),
        published(space.num_layers),
    )
    vocabulary = space.vocabularies[len(space.vocabularies) // 2]
    for source, skip_set in different(chain.from_iterable(families)):
        yield source, Candidate(skip_set, bridged=space.bridges, vocabulary=vocabulary)


def _sublayer_costs(num_layers: int, latency: LatencyModel) -> Sequence[float]:
    step = latency.short.step
    pair = (step.attention, step.mlp)
    smallest = max(*pair, 1e-9) / 100  # a measurement may say that a sublayer costs nothing
    return [max(cost, smallest) for _ in range(num_layers) for cost in pair]
