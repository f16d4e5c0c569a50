"""A sampler that knows what it is searching: it learns the damage of each sublayer and computes the rest."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from layerskip.drafting.config import DraftConfig
from search.samplers.draft_costs import DraftCosts
from search.samplers.draft_maximizer import DraftMaximizer
from search.samplers.neighbours import nearby
from search.space import SearchSpace
from studies.acceptance_model import AcceptanceModel
from studies.ranking import ACCEPTANCE_KEY


class GreyBoxSampler(BaseSampler):
    """Thompson sampling over the damage of each sublayer, with the known formula of the speedup on top.

    A black-box sampler learns from a trial's value alone. Here all but one thing is known: the speedup follows from the
    acceptance rate and the costs, and the costs were measured. What is left, the acceptance rate of a candidate, is
    learned by :class:`studies.acceptance_model.AcceptanceModel` from the user attribute ``acceptance`` of every trial
    that has one, whoever proposed it and whether it was pruned or not. Damages drawn from its posterior are then turned
    into the candidate that would be best if they were true, by
    :class:`search.samplers.draft_maximizer.DraftMaximizer`.

    No candidate is proposed twice in a study, as long as there is another. Parameters that are not of the space are
    drawn at random.

    A proposal depends on the seed, the trial's number and the trials that it knows, and on nothing else: workers may
    share a seed, and a resumed study does not draw the same again.

    Args:
        space: The candidates to choose among.
        costs: Of drafts; must be picklable if the sampler is to be.
        seed: Makes proposals repeatable; None draws one.
    """

    def __init__(self, space: SearchSpace, costs: DraftCosts, *, seed: int | None = None) -> None:
        self._space = space
        self._maximizer = DraftMaximizer(space, costs)
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of the space; known before the first trial."""
        return self._space.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A candidate that is new in the study."""
        trials = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        tried = [(self._space.config_or_none(other.params), _acceptance_of(other)) for other in trials]
        seen = {config: rate for config, rate in tried if config is not None and rate is not None}
        space = self._space
        model = AcceptanceModel(seen, 2 * space.num_layers, space.vocabulary_sizes, space.draft_layers)
        damage = model.sample(np.random.default_rng([self._seed, trial.number]))
        best = self._maximizer.best(damage).config
        bases = ((base, self._maximizer.nearest_to_break_even(damage, base)) for base in self._with_all_options(best))
        known = {config for config, _ in tried}
        new = (config for base, order in bases for config in nearby(base, order) if config not in known)
        return space.parameters(next(new, best))

    def _with_all_options(self, best: DraftConfig) -> Iterator[DraftConfig]:
        """A candidate, then the same skip set with every other choice."""
        yield best
        for options in self._space.options:
            if not all(best.skip_set.mask[: options.exit_at]):
                other = replace(options, skip_set=best.skip_set)
                if other != best:
                    yield other

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value."""
        seed = np.random.SeedSequence([self._seed, trial.number, zlib.crc32(param_name.encode())])
        sampler = RandomSampler(int(seed.generate_state(1)[0]))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def _acceptance_of(trial: FrozenTrial) -> float | None:
    """The acceptance rate of a trial, if it is known; not if the trial failed, for it may have failed at that."""
    rate = trial.user_attrs.get(ACCEPTANCE_KEY)
    known = trial.state != TrialState.FAIL and isinstance(rate, int | float) and math.isfinite(rate)
    return float(rate) if known else None  # type: ignore[arg-type]
