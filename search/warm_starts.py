"""What a search tries first: every family of starts, for one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import optuna
from optuna.trial import FrozenTrial, TrialState

from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from search.estimate import Estimator, acceptance
from search.latency import LatencyModel
from search.quiet import Quiet
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
from search.trials import SOURCE_KEY

# A study that has this attribute was given all of them.
STARTED_KEY = "warm_starts"


class StartingPlan:
    """A callback for a study: enqueues the next starts when few wait, so that the first ones need not wait for all.

    Args:
        starts: Candidates with where they come from, worked out as they are taken.
        space: Gives their parameters.
        ahead: How many shall wait.
        quiet: Turns with other workers.
    """

    def __init__(self, starts: Iterator[tuple[str, Candidate]], space: SearchSpace, ahead: int, quiet: Quiet) -> None:
        self._starts = starts
        self._space = space
        self._ahead = ahead
        self._quiet = quiet

    def __call__(self, study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        """Enqueue what is missing."""
        while _waiting(study) < self._ahead and not study.user_attrs.get(STARTED_KEY):
            with self._quiet.beside_others():
                start = next(self._starts, None)
            if start is None:
                study.set_user_attr(STARTED_KEY, True)
                return
            source, candidate = start
            parameters = self._space.parameters(candidate)
            study.enqueue_trial(parameters, user_attrs={SOURCE_KEY: source}, skip_if_exists=True)


def _waiting(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def warm_starts(
    model: LayerSkipModel, space: SearchSpace, estimator: Estimator, latency: LatencyModel
) -> Iterator[tuple[str, Candidate]]:
    """Candidates, each with where it comes from; those that take long to work out come last.

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
        early_exits(space.num_layers),
        published(space.num_layers),
        least_change(text.states),
        most_similar_paths(text.states, text.run_sublayer, costs),
        least_damage(alone, costs),
    )
    vocabulary = space.vocabularies[len(space.vocabularies) // 2]
    for source, skip_set in different(chain.from_iterable(families)):
        yield source, Candidate(skip_set, bridged=space.bridges, vocabulary=vocabulary)


def _sublayer_costs(num_layers: int, latency: LatencyModel) -> Sequence[float]:
    step = latency.short.step
    pair = (step.attention, step.mlp)
    smallest = max(*pair, 1e-9) / 100  # a measurement may say that a sublayer costs nothing
    return [max(cost, smallest) for _ in range(num_layers) for cost in pair]
