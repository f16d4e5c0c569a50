"""Searchers that decode for real in every trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, TPESampler

from benchmarks.rivals.contest import Incumbent, Stopwatch, Task, decode_seconds_per_token
from layerskip import AdaptiveThreshold, SkipSet
from layerskip.drafting.config import DraftConfig
from layerskip.errors import InvalidInputError

# Draft & Verify's adaptive stopping rule, with its published numbers.
_STOPPING = AdaptiveThreshold()


def tpe(task: Task) -> Iterator[Incumbent]:
    """TPE over 2·L integers, 10 prompts × 100 tokens a trial."""
    sampler = TPESampler(seed=task.seed)
    return _search(task, sampler, _integers, prompts=10, max_new_tokens=100)


def draft_and_verify(task: Task) -> Iterator[Incumbent]:
    """A Gaussian process with expected improvement over the 2·L box, 8 prompts × 32 tokens a trial.

    Zhang et al. (arXiv 2309.08168), section 3.2: a coordinate of at least one half skips its sublayer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = GPSampler(seed=task.seed)
    return _search(task, sampler, _box, prompts=8, max_new_tokens=32)


def _integers(trial: optuna.Trial, bits: int) -> list[bool]:
    return [trial.suggest_int(f"skip_{bit}", 0, 1) == 1 for bit in range(bits)]


def _box(trial: optuna.Trial, bits: int) -> list[bool]:
    return [trial.suggest_float(f"skip_{bit}", 0, 1) >= 0.5 for bit in range(bits)]


def _search(
    task: Task,
    sampler: BaseSampler,
    suggest: Callable[[optuna.Trial, int], list[bool]],
    *,
    prompts: int,
    max_new_tokens: int,
) -> Iterator[Incumbent]:
    study = optuna.create_study(sampler=sampler, direction="minimize")
    watch, best = Stopwatch(task), float("inf")
    decoded = task.prompts.scored[:prompts]
    while not watch.over:
        trial = study.ask()
        try:
            skip_set = SkipSet.from_mask(suggest(trial, len(task.model.sublayers)))
        except InvalidInputError:  # everything skipped
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        config = DraftConfig(skip_set, stopping=_STOPPING)
        seconds = decode_seconds_per_token(task, config, decoded, max_new_tokens)
        study.tell(trial, seconds)
        if seconds < best:
            best = seconds
            yield Incumbent(watch.seconds, config)
