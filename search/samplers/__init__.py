"""Samplers: what proposes the next trial of a search."""

from __future__ import annotations

from optuna.samplers import BaseSampler, TPESampler

from layerskip.errors import InvalidInputError
from search.samplers.draft_costs import DraftCosts
from search.samplers.grey_box_sampler import GreyBoxSampler
from search.samplers.no_repeats import NoRepeats
from search.settings import SAMPLERS
from search.space import SearchSpace

__all__ = ["DraftCosts", "GreyBoxSampler", "NoRepeats", "make_sampler"]

# Warm starts give TPE enough to go by; random skip sets skip half of the model and teach little.
_RANDOM_TRIALS = 5


def make_sampler(name: str, space: SearchSpace, costs: DraftCosts, *, seed: int | None = None) -> BaseSampler:
    """A sampler by its name.

    Args:
        name: ``"tpe"``, Optuna's default, which sees parameters and values alone; or ``"greybox"``, which learns from
            acceptance rates and knows the costs.
        space: The search space.
        costs: Of drafts.
        seed: Makes proposals repeatable. With a seed, TPE proposes the same again when a study is resumed or workers
            share it: give each another.

    Raises:
        InvalidInputError: There is no sampler of this name.
    """
    match name:
        case "greybox":
            return GreyBoxSampler(space, costs, seed=seed)
        case "tpe":
            return TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)
    raise InvalidInputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got '{name}'")
