"""A sampler that lets no candidate be tried twice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from layerskip.drafting.config import DraftConfig
from search.samplers.neighbours import nearby
from search.space import DRAFT_LAYER, SearchSpace

# Trials that have chosen their parameters; those that wait have them in their attributes.
_CHOSEN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


class NoRepeats(BaseSampler):
    """Replaces what another sampler proposes, if it was tried before, by a neighbour that was not.

    Optuna's samplers propose the same candidate again, the more often the surer they are. Bits that a draft layer makes
    meaningless are 1 in what this one proposes, so that two trials of the same candidate have the same parameters.

    Args:
        sampler: Proposes.
        space: The search space.
        seed: Makes the choice of neighbours repeatable.
    """

    def __init__(self, sampler: BaseSampler, space: SearchSpace, *, seed: int | None = None) -> None:
        self._sampler = sampler
        self._space = space
        self._random = random.Random(seed)

    def reseed_rng(self) -> None:
        self._sampler.reseed_rng()
        self._random.seed()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        proposed = self._sampler.sample_relative(study, trial, search_space)
        config = self._space.config_or_none(proposed)
        if config is None:  # some parameters are proposed one by one: which bits matter is known only then
            return {}
        tried = {self._space.config_or_none(other.params) for other in study.get_trials(deepcopy=False, states=_CHOSEN)}
        return proposed | self._space.parameters(self._new(config, tried))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        layer = self._space.draft_layer(trial.params.get(DRAFT_LAYER, 0))
        if layer and param_name in self._space.bit_names[layer.start :]:
            return 1  # whatever is drawn, the draft layer runs there
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler.after_trial(study, trial, state, values)

    def _new(self, config: DraftConfig, tried: set[DraftConfig | None]) -> DraftConfig:
        """The candidate, or one that differs in a random bit, in two, or more, and was not tried; itself if all were.

        Below a low exit there are few: then it may differ in its options, too.
        """
        around = self._neighbours(config)
        if config.draft_layer:
            others = (replace(options, skip_set=config.skip_set) for options in self._space.options)
            around = chain(around, *(self._neighbours(other) for other in others))
        return next((neighbour for neighbour in around if neighbour not in tried), config)

    def _neighbours(self, config: DraftConfig) -> Iterator[DraftConfig]:
        """The candidate, then those that differ from it in one of the bits that matter, in two, and so on."""
        bits = list(range(config.exit_at))
        self._random.shuffle(bits)
        return nearby(config, bits)
