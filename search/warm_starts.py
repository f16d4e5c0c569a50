"""Warm starts: the candidates that a search evaluates first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import optuna
from optuna.trial import FrozenTrial, TrialState

from layerskip.costs import CostModel
from layerskip.drafting.config import DraftConfig
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from search.acceptance_tracer import AcceptanceTracer
from search.machine_lock import MachineLock
from search.space import SearchSpace
from search.starting_skip_sets import (
    different,
    early_exits,
    evenly_spaced,
    least_change,
    least_damage,
    most_similar_paths,
    nothing_skipped,
    published,
    skipping_few,
)
from search.traces import acceptance
from studies.ranking import REVISITS_KEY, SOURCE_KEY
from studies.study import SINGLE_SUBLAYER_KEY

# A study that has this attribute got all of them.
STARTED_KEY = "warm_starts"


class SingleSublayerAcceptance:
    """Acceptance rates of drafts that skip a single sublayer, on the first few texts.

    Attributes:
        known: The rate of each draft that was asked for, by what it skips.

    Args:
        model: The model.
        tracer: Traces drafts.
    """

    def __init__(self, model: LayerSkipModel, tracer: AcceptanceTracer) -> None:
        self._model = model
        self._tracer = tracer
        self.known: dict[str, float] = {}

    def __call__(self, skip_set: SkipSet) -> float:
        """The acceptance rate α of the draft that skips this, without bridges and with the whole vocabulary."""
        if str(skip_set) not in self.known:
            rate = acceptance(next(self._tracer.trace(self._model.stack_of(skip_set))))
            self.known[str(skip_set)] = rate
        return self.known[str(skip_set)]


class WarmStartPlan:
    """A callback for a study: enqueues the next starts when few are waiting, so that the first need not wait for all.

    It enqueues no more than the search has to evaluate: at its end, promising candidates are measured once none waits.

    Args:
        starts: Candidates with their sources, computed as they are taken.
        alone: Acceptance rates of single sublayers that they ask for; the study keeps them.
        space: Gives their parameters.
        ahead: How many starts to keep waiting.
        trials: Candidates that the search evaluates.
        lock: Keeps other workers from measuring meanwhile.
    """

    def __init__(
        self,
        starts: Iterator[tuple[str, DraftConfig]],
        alone: SingleSublayerAcceptance,
        space: SearchSpace,
        ahead: int,
        trials: int,
        lock: MachineLock,
    ) -> None:
        self._starts = starts
        self._alone = alone
        self._space = space
        self._ahead = ahead
        self._trials = trials
        self._lock = lock

    def __call__(self, study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        """Enqueue as many starts as are missing."""
        while self._are_missing(study) and not study.user_attrs.get(STARTED_KEY):
            with self._lock.shared():
                start = next(self._starts, None)
            if len(study.user_attrs.get(SINGLE_SUBLAYER_KEY, ())) < len(self._alone.known):
                study.set_user_attr(SINGLE_SUBLAYER_KEY, self._alone.known)
            if start is None:
                study.set_user_attr(STARTED_KEY, True)
                return
            source, candidate = start
            parameters = self._space.parameters(candidate)
            study.enqueue_trial(parameters, user_attrs={SOURCE_KEY: source}, skip_if_exists=True)

    def _are_missing(self, study: optuna.Study) -> bool:
        trials = study.get_trials(deepcopy=False)
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        begun = sum(trial.state != TrialState.FAIL and REVISITS_KEY not in trial.user_attrs for trial in trials)
        return waiting < self._ahead and begun < self._trials


def warm_starts(
    space: SearchSpace, alone: Callable[[SkipSet], float], tracer: AcceptanceTracer, cost_model: CostModel
) -> Iterator[tuple[str, DraftConfig]]:
    """Candidates with their sources: those with draft layers, those at lower precision, then all others, the fastest to
    compute first.

    Args:
        space: The search space.
        alone: The acceptance rate of a draft that skips a single sublayer.
        tracer: Has the texts that starts are computed from.
        cost_model: What sublayers cost.
    """
    costs = _sublayer_costs(space.num_layers, cost_model)
    yield from _with_draft_layers(space, alone, costs)
    yield from _at_lower_precision(space, alone, costs)
    text = tracer.sublayer_runner()
    families = (
        nothing_skipped(space.num_layers),
        evenly_spaced(space.num_layers),
        early_exits(space.num_layers),
        published(space.num_layers),
        least_change(text.states),
        most_similar_paths(text.states, text.run_sublayer, costs),
        least_damage(alone, costs),
    )
    size = space.vocabulary_sizes[len(space.vocabulary_sizes) // 2]
    for source, skip_set in different(chain.from_iterable(families)):
        yield source, DraftConfig(skip_set, space.bridges, vocabulary_size=size, precision=space.precisions[0])


def _at_lower_precision(
    space: SearchSpace, alone: Callable[[SkipSet], float], costs: Sequence[float]
) -> Iterator[tuple[str, DraftConfig]]:
    """The whole model at each lower precision, with the whole vocabulary and with a shorter one; then some skipped."""
    lower = [precision for precision in reversed(space.precisions) if precision != "full"]
    sizes = space.vocabulary_sizes
    whole = [
        DraftConfig(SkipSet(space.num_layers), vocabulary_size=size, precision=precision)
        for size in dict.fromkeys((sizes[0], sizes[len(sizes) // 2]))
        for precision in lower
    ]
    for config in whole:
        yield f"nothing skipped: {config.precision}", config
    for config in whole:
        for source, skip_set in skipping_few(2 * space.num_layers, alone, costs):
            yield f"{source}, {config.precision}", replace(config, skip_set=skip_set)


def _with_draft_layers(
    space: SearchSpace, alone: Callable[[SkipSet], float], costs: Sequence[float]
) -> Iterator[tuple[str, DraftConfig]]:
    """Each draft layer as it was trained, then with a few sublayers skipped below its exit."""
    sizes = space.vocabulary_sizes
    trained = {
        f"trained draft layer {number} of {len(space.draft_layers)}": DraftConfig(
            SkipSet(space.num_layers),
            draft_layer=layer,
            vocabulary_size=layer.vocabulary_size if layer.vocabulary_size in sizes else sizes[0],
        )
        for number, layer in enumerate(space.draft_layers, start=1)
    }
    yield from trained.items()
    for name, config in trained.items():
        for source, skip_set in skipping_few(config.exit_at, alone, costs):
            yield f"{name}, {source}", replace(config, skip_set=skip_set)


def _sublayer_costs(num_layers: int, cost_model: CostModel) -> Sequence[float]:
    step = cost_model.short.step
    pair = (step.attention, step.mlp)
    smallest = max(*pair, 1e-9) / 100  # a measurement may say that a sublayer costs nothing
    return [max(cost, smallest) for _ in range(num_layers) for cost in pair]
