"""SWIFT (Xia et al., arXiv 2410.06916): random search with Bayesian steps between, on teacher-forced matches."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning

from benchmarks.rivals.contest import Incumbent, Stopwatch, Task
from layerskip import ConfidenceThreshold, SkipSet
from layerskip.drafting.config import DraftConfig
from search.acceptance_tracer import AcceptanceTracer
from search.reference import ReferenceRun
from search.traces import acceptance

_SKIP_RATIO = 0.45
_BAYESIAN_EVERY = 25
_STOPPING = ConfidenceThreshold(0.8, 8)
_TEXTS = 4


def swift(task: Task) -> Iterator[Incumbent]:
    """Random skip sets of a fixed size, first and last layer kept; every 25th is proposed by a Gaussian process."""
    watch = Stopwatch(task)
    source, layers = random.Random(task.seed), task.model.num_layers
    count = round(_SKIP_RATIO * (layers - 2))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        texts = ReferenceRun(task.model, Path(folder), task.fingerprint).texts(
            task.prompts.scored[:_TEXTS], max_new_tokens=task.max_new_tokens
        )
        estimator = AcceptanceTracer(task.model, texts)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.GPSampler(seed=task.seed))
        best, number = -1.0, 0
        while not watch.over:
            number += 1
            if number % _BAYESIAN_EVERY:
                scores = {f"skip_{bit}": source.random() for bit in range(2 * (layers - 2))}
                study.enqueue_trial(scores)
            trial = study.ask()
            scores = {f"skip_{bit}": trial.suggest_float(f"skip_{bit}", 0, 1) for bit in range(2 * (layers - 2))}
            skip_set = _highest(list(scores.values()), layers, count)
            match = acceptance([t for part in estimator.trace(task.model.stack_of(skip_set)) for t in part])
            study.tell(trial, match)
            if match > best:
                best = match
                yield Incumbent(watch.seconds, DraftConfig(skip_set, stopping=_STOPPING))


def _highest(scores: list[float], layers: int, count: int) -> SkipSet:
    """The skip set of the ``count`` attention and MLP sublayers with the highest scores each, of the inner layers."""
    attention = sorted(range(layers - 2), key=lambda i: scores[2 * i], reverse=True)[:count]
    mlp = sorted(range(layers - 2), key=lambda i: scores[2 * i + 1], reverse=True)[:count]
    return SkipSet(layers, tuple(sorted(i + 1 for i in attention)), tuple(sorted(i + 1 for i in mlp)))
