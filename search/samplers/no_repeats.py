"""A sampler that lets no candidate be tried twice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.samplers.best_draft import nearby
from search.samplers.choices import STAND_IN, Draft, DraftChoices

# Trials that chose, or were told, what to try; those that wait are told it in their attributes.
_CHOSEN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


class NoRepeats(BaseSampler):
    """Replaces what another sampler proposes, if it was tried before, by a neighbour that was not.

    Optuna's samplers propose the same again, the more often the surer they are. Bits that do not matter are 1 in what
    they propose, so that two trials of the same candidate have the same parameters.

    Args:
        sampler: Proposes.
        choices: What a draft may be.
        seed: Makes the choice of neighbours repeatable.
    """

    def __init__(self, sampler: BaseSampler, choices: DraftChoices, *, seed: int | None = None) -> None:
        self._sampler = sampler
        self._choices = choices
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
        draft = self._choices.draft(proposed)
        if draft is None:  # some parameters, or all, are sampled one by one
            return self._with_run(proposed, study, trial, search_space)
        return proposed | self._choices.parameters(self._new(draft, self._tried(study)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        chosen = trial.params.get(STAND_IN, 0)
        if chosen and param_name in self._choices.bits[self._choices.free(chosen) :]:
            return 1  # whatever is drawn, the stand-in runs there
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler.after_trial(study, trial, state, values)

    def _with_run(
        self, proposed: dict[str, Any], study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A part of a draft, with all left out that its stand-in stands for."""
        if STAND_IN not in search_space or not proposed:
            return proposed
        if STAND_IN not in proposed:
            drawn = self.sample_independent(study, trial, STAND_IN, search_space[STAND_IN])
            proposed = proposed | {STAND_IN: drawn}
        run = self._choices.bits[self._choices.free(proposed[STAND_IN]) :]
        return proposed | {name: 1 for name in run if name in proposed}

    def _tried(self, study: Study) -> set[Draft | None]:
        return {self._choices.draft(trial.params) for trial in study.get_trials(deepcopy=False, states=_CHOSEN)}

    def _new(self, draft: Draft, tried: set[Draft | None]) -> Draft:
        """The draft, or one that differs in a random bit, in two, or more, and was not tried; itself if there is none.

        Below a low exit there are few: then it may differ in what there is beside the bits, too.
        """
        around = self._neighbours(draft)
        if draft.stand_in:
            same = (draft.bridged, draft.vocabulary, draft.stand_in)
            others = (Draft(draft.mask, *extras) for extras in self._choices.extras if extras != same)
            around = chain(around, *(self._neighbours(self._choices.effective(other)) for other in others))
        return next((one for one in around if one not in tried), draft)

    def _neighbours(self, draft: Draft) -> Iterator[Draft]:
        """The draft, then those that differ from it in one of the bits that matter, in two, and so on."""
        bits = list(range(self._choices.free(draft.stand_in)))
        self._random.shuffle(bits)
        return nearby(draft, bits)
