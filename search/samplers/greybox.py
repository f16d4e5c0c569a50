"""A sampler that knows what it is searching: it learns the damage of each sublayer and computes the rest."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.samplers.best_draft import DraftMaximizer, nearby
from search.samplers.choices import Draft, DraftChoices
from search.samplers.damage import DamageModel
from search.samplers.speedup import DraftCosts

ACCEPTANCE_KEY = "acceptance"


class GreyBoxSampler(BaseSampler):
    """Thompson sampling over the damage of each sublayer, with the known formula of the speedup on top.

    A black-box sampler learns from a trial's value alone. Here all but one thing is known: the speedup follows from the
    acceptance rate and the costs, and the costs were measured. What is left, the acceptance rate of a skip set, is
    learned by :class:`search.samplers.damage.DamageModel` from the user attribute ``acceptance`` of every trial that
    has one, whoever proposed it and whether it was pruned or not. Damages drawn from its posterior are then turned into
    the draft that would be best if they were true, by :class:`search.samplers.best_draft.DraftMaximizer`.

    No draft is proposed twice in a study, as long as there is another. Parameters that are no part of ``choices`` are
    drawn at random.

    A proposal depends on the seed, the trial's number and the trials that it knows, and on nothing else: workers may
    share a seed, and a study that goes on does not draw the same again.

    Args:
        choices: What a draft may be.
        costs: What passes cost; must be picklable if the sampler is to be.
        max_draft_length: Longest draft that the formula may assume.
        seed: Makes proposals repeatable; None draws one.
    """

    def __init__(
        self, choices: DraftChoices, costs: DraftCosts, *, max_draft_length: int = 8, seed: int | None = None
    ) -> None:
        self._choices = choices
        self._maximizer = DraftMaximizer(choices, costs, max_draft_length)
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The bits and what else a draft may be; known before the first trial."""
        return self._choices.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A draft that is new in the study."""
        known = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        model = self._model(known)
        damage = model.sample(np.random.default_rng([self._seed, trial.number]))
        best = self._maximizer.best(damage).draft
        tried = {self._choices.draft(other.params) for other in known}
        bases = ((base, self._maximizer.by_indifference(damage, base)) for base in self._with_all_extras(best))
        new = (draft for base, order in bases for draft in nearby(base, order) if draft not in tried)
        return self._choices.parameters(next(new, best))

    def _with_all_extras(self, best: Draft) -> Iterator[Draft]:
        """A draft, then the same mask with everything else that may be chosen beside it."""
        yield best
        for extras in self._choices.extras:
            if extras != (best.bridged, best.vocabulary, best.stand_in):
                yield self._choices.effective(Draft(best.mask, *extras))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value."""
        seed = np.random.SeedSequence([self._seed, trial.number, zlib.crc32(param_name.encode())])
        sampler = RandomSampler(int(seed.generate_state(1)[0]))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _model(self, trials: list[FrozenTrial]) -> DamageModel:
        seen: dict[Draft, float] = {}  # a measurement tells no more of it than the look before did
        for trial in trials:
            draft, acceptance = self._choices.draft(trial.params), _acceptance_of(trial)
            if draft is not None and acceptance is not None:
                seen[draft] = acceptance
        return DamageModel(self._choices, list(seen), list(seen.values()))


def _acceptance_of(trial: FrozenTrial) -> float | None:
    """What is known of a trial's acceptance rate; nothing if it failed, for it may have failed at that."""
    rate = trial.user_attrs.get(ACCEPTANCE_KEY)
    known = trial.state != TrialState.FAIL and isinstance(rate, int | float) and math.isfinite(rate)
    return float(rate) if known else None  # type: ignore[arg-type]
