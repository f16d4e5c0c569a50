"""Finalists: the best candidates of a search, which are measured again on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial

from layerskip.costs import DraftRoundCosts
from layerskip.profile import PromptSet
from search.measure import Summary
from search.space import SearchSpace
from studies.ranking import best_trials, config_of, measured_trials


@dataclass(frozen=True)
class Finalist:
    """A trial whose candidate was measured.

    Args:
        trial: The trial.
        summary: What was measured.
        prompt_set: On which prompts.
        costs: What its rounds cost, by which its drafting paused meanwhile; None if it never paused.
    """

    trial: FrozenTrial
    summary: Summary
    prompt_set: PromptSet
    costs: DraftRoundCosts | None = None


@dataclass(frozen=True)
class WithoutCopies:
    """The best candidate that needs no copies of the model at lower precision.

    Args:
        trial: Its trial's number.
        speedup: On held-out prompts.
        draft: How it drafts, human-readable.
    """

    trial: int
    speedup: float
    draft: str


def choose_finalists(study: optuna.Study, count: int, space: SearchSpace) -> list[FrozenTrial]:
    """The best trials; where precisions are searched, also the best one that needs no copies.

    Args:
        study: The study.
        count: How many of the best.
        space: What was searched.
    """
    ranked = best_trials(study, len(study.get_trials(deepcopy=False)))
    best = ranked[:count]
    if len(space.precisions) > 1:
        without_copies = next((trial for trial in ranked if config_of(trial).precision == "full"), None)
        if without_copies is not None and without_copies not in best:
            best.append(without_copies)
    return best


def best_without_copies(finalists: Sequence[Finalist], space: SearchSpace) -> WithoutCopies | None:
    """The best finalist that needs no copies; None where none does, or the search tried one precision alone."""
    full = [finalist for finalist in finalists if config_of(finalist.trial).precision == "full"]
    if len(space.precisions) == 1 or not full:
        return None
    best = max(full, key=lambda finalist: finalist.summary.speedup)
    return WithoutCopies(best.trial.number, best.summary.speedup, str(config_of(best.trial)))


def measured_in_search(study: optuna.Study) -> list[Finalist]:
    """The candidates that the search itself measured on all of its prompts."""
    names = Summary.__dataclass_fields__
    return [
        Finalist(trial, Summary(**{name: trial.user_attrs[name] for name in names}), "search")
        for trial in measured_trials(study)
    ]
