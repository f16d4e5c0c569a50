"""Samplers by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from layerskip.errors import InvalidInputError
from search.samplers.choices import DraftChoices
from search.samplers.greybox import GreyBoxSampler
from search.samplers.speedup import DraftCosts
from search.settings import SAMPLERS

# Warm starts give samplers enough to go by; random skip sets leave out half of the model and teach little.
_RANDOM_TRIALS = 5
# Optuna's default of 50 leaves a search of 150 trials three generations.
_POPULATION = 20

# Those that know no more of a problem than its parameters and values.
_BLACK_BOXES: dict[str, Callable[[int | None], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS),
    "gp": lambda seed: _gaussian_process(seed),
    "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=_POPULATION),
    "random": lambda seed: RandomSampler(seed),
}


def make_sampler(
    name: str, *, choices: DraftChoices, costs: DraftCosts, max_draft_length: int = 8, seed: int | None = None
) -> BaseSampler:
    """A sampler by its name.

    Args:
        name: ``"greybox"``, which learns from acceptance rates and knows the costs; ``"tpe"``; ``"gp"``, a Gaussian
            process, which takes seconds for a proposal and passes pruned trials over; ``"nsga2"``, an evolutionary
            algorithm; or ``"random"``.
        choices: What a draft may be; the black boxes ask trials instead.
        costs: What passes cost; only ``"greybox"`` wants to know.
        max_draft_length: Longest draft that ``"greybox"`` may assume.
        seed: Makes proposals repeatable. All but ``"greybox"`` propose the same again when a study goes on or workers
            share a seed: give each another.

    Raises:
        InvalidInputError: There is no sampler of this name.
    """
    if name == "greybox":
        return GreyBoxSampler(choices, costs, max_draft_length=max_draft_length, seed=seed)
    if name not in _BLACK_BOXES:
        raise InvalidInputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got '{name}'")
    return _BLACK_BOXES[name](seed)


def _gaussian_process(seed: int | None) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return GPSampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)
