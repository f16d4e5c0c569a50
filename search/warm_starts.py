"""What a search tries first: every family of starts, for one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


class AcceptanceAlone:
    """What leaving out one sublayer alone does to the acceptance rate, on the texts of a first look.

    Attributes:
        known: The acceptance rate of each draft that was asked for, by what it skips.

    Args:
        model: The model.
        estimator: Scores drafts.
    """

    def __init__(self, model: LayerSkipModel, estimator: Estimator) -> None:
        self._model = model
        self._estimator = estimator
        self.known: dict[str, float] = {}

    def __call__(self, skip_set: SkipSet) -> float:
        """The acceptance rate α of the draft that skips this, without bridges and with the whole vocabulary."""
        rate = acceptance(next(self._estimator.traces(self._model.stack_of(skip_set))))
        self.known[str(skip_set)] = rate
        return rate


def warm_starts(
    space: SearchSpace, alone: Callable[[SkipSet], float], estimator: Estimator, latency: LatencyModel
) -> Iterator[tuple[str, Candidate]]:
    """Candidates, each with where it comes from.

    Args:
        space: The choices of the search.
        alone: Gives the acceptance rate of a draft that skips a single sublayer.
        estimator: Has the texts that starts look at.
        latency: What sublayers cost.
    """
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
