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
from studies.ranking import best_trials, completed_trials, config_of


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
class AtFullPrecision:
    """The best candidate that needs no rounded copy of the weights.

    Args:
        trial: Its trial's number.
        speedup: On held-out prompts.
        draft: How it drafts, human-readable.
    """

    trial: int
    speedup: float
    draft: str


def choose_finalists(study: optuna.Study, count: int, space: SearchSpace) -> list[FrozenTrial]:
    """The best trials; where precisions are searched, also the best one at full precision.

    Args:
        study: The study.
        count: How many of the best.
        space: What was searched.
    """
    ranked = best_trials(study)
    best = ranked[:count]
    if len(space.precisions) > 1:
        full_precision = next((trial for trial in ranked if config_of(trial).precision == "full"), None)
        if full_precision is not None and full_precision not in best:
            best.append(full_precision)
    return best


def best_at_full_precision(finalists: Sequence[Finalist], space: SearchSpace) -> AtFullPrecision | None:
    """The best finalist at full precision; None where none is, or the search tried one precision alone."""
    full = [finalist for finalist in finalists if config_of(finalist.trial).precision == "full"]
    if len(space.precisions) == 1 or not full:
        return None
    best = max(full, key=lambda finalist: finalist.summary.speedup)
    return AtFullPrecision(best.trial.number, best.summary.speedup, str(config_of(best.trial)))


def measured_in_search(study: optuna.Study) -> list[Finalist]:
    """The candidates that the search itself measured on all of its prompts."""
    names = Summary.__dataclass_fields__
    return [
        Finalist(trial, Summary(**{name: trial.user_attrs[name] for name in names}), "search")
        for trial in completed_trials(study)
    ]
