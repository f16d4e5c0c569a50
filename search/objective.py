"""One trial: a candidate's speedup is predicted, or that of a promising one is measured."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from layerskip.drafting.config import DraftConfig
from layerskip.errors import InvalidInputError
from search.machine_lock import MachineLock
from search.measure import Measurement, hopeless, summarize
from search.predict import Prediction, SpeedupPredictor
from search.prompts import EncodedPrompt
from search.space import SearchSpace
from studies.ranking import (
    ACCEPTANCE_KEY,
    BASIS_KEY,
    CONFIG_KEY,
    DRAFT_COST_KEY,
    PREDICTED_KEY,
    STOPPED_KEY,
    HasTrials,
    Snapshot,
    config_of,
    evaluated_trials,
    fully_measured_trials,
    speedup_of,
)

SOURCE_KEY = "source"
# Marks an enqueued trial that is to be measured, with the number of the trial that looked promising.
MEASURES_KEY = "measures"
SECONDS_KEY = "seconds"
COMPLETE_KEY = "complete"
# Names the sampler that proposed a trial, where there is no other source.
SAMPLER_KEY = "sampler"
# The draft configuration but for its skip set, for people.
_DRAFT_KEY = "draft"
_SPEEDUPS_KEY = "speedups"
_SECONDS_BY_TEXT_KEY = "predicted_seconds"
# What the measurement of a candidate takes over from its prediction.
_PREDICTED = (_DRAFT_KEY, CONFIG_KEY, ACCEPTANCE_KEY, PREDICTED_KEY, COMPLETE_KEY, _SECONDS_BY_TEXT_KEY)


Measure = Callable[[int, DraftConfig, Sequence[EncodedPrompt]], Iterator[Measurement]]


@dataclass(frozen=True)
class Objective:
    """What Optuna calls for each trial: the speedup, predicted or measured, of what it chose.

    Args:
        space: The search space.
        predictor: Predicts speedups.
        measure: Decodes prompts with a trial's draft configuration, and records what it measures.
        lock: Gives measurements the machine to themselves.
        prompts: What measured candidates decode.
        sampler: Name of the sampler that proposes what was not enqueued, for the record.
    """

    space: SearchSpace
    predictor: SpeedupPredictor
    measure: Measure
    lock: MachineLock
    prompts: Sequence[EncodedPrompt]
    sampler: str

    def __call__(self, trial: optuna.Trial) -> float:
        try:
            return self._speedup(trial)
        except KeyboardInterrupt:
            _enqueue_again(trial)
            raise

    def _speedup(self, trial: optuna.Trial) -> float:
        try:
            candidate = self.space.suggest(trial)
        except InvalidInputError as error:  # every sublayer skipped
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("skip_set", str(candidate.skip_set))
        if MEASURES_KEY in trial.user_attrs:
            return self._measured(trial, _trial(trial, trial.user_attrs[MEASURES_KEY]))
        if SOURCE_KEY not in trial.user_attrs:
            trial.set_user_attr(SAMPLER_KEY, self.sampler)
        now = Snapshot(trial.study)
        known = _evaluated_before(trial, now)
        if known is not None:
            _note(trial, {key: known.user_attrs[key] for key in (*_PREDICTED, BASIS_KEY)})
            trial.set_user_attr("answered_from", known.number)
            return speedup_of(known)
        with self.lock.shared():
            prediction = self.predictor.predict(candidate, to_beat=_best_predicted(now))
        _note(trial, _described(prediction) | {BASIS_KEY: "predicted"})
        return prediction.simulated.speedup

    def _measured(self, trial: optuna.Trial, predicted: FrozenTrial) -> float:
        _note(trial, {key: predicted.user_attrs[key] for key in _PREDICTED} | {BASIS_KEY: "measured"})
        started = time.perf_counter()
        with self.lock.exclusive():
            summary = summarize(self._decode(trial, config_of(predicted)))
        _note(trial, asdict(summary) | {SECONDS_KEY: time.perf_counter() - started})
        return summary.speedup

    def _decode(self, trial: optuna.Trial, config: DraftConfig) -> list[Measurement]:
        """Decode prompts in random order until all are done, or the candidate is clearly slower than the best one.

        A trial that stops early has the speedup of the prompts that it decoded.
        """
        prompts = list(self.prompts)
        random.Random(trial.number).shuffle(prompts)
        best = _best_measured(trial.study)
        measured: list[Measurement] = []
        for measurement in self.measure(trial.number, config, prompts):
            measured.append(measurement)
            speedups = {m.prompt: m.speedup for m in measured}
            if len(measured) < len(prompts) and hopeless(speedups, best):
                trial.set_user_attr(STOPPED_KEY, True)
                break
        trial.set_user_attr(_SPEEDUPS_KEY, speedups)
        return measured


def _best_predicted(study: HasTrials) -> Sequence[float]:
    """The seconds that each text was predicted to take with the best candidate that was traced on all texts."""
    best = max((t for t in evaluated_trials(study) if t.user_attrs[COMPLETE_KEY]), key=speedup_of, default=None)
    return () if best is None else best.user_attrs[_SECONDS_BY_TEXT_KEY]


def _best_measured(study: HasTrials) -> Mapping[str, float]:
    """The speedup of each prompt with the best candidate that was measured so far."""
    best = max(fully_measured_trials(study), key=speedup_of, default=None)
    return {} if best is None else best.user_attrs[_SPEEDUPS_KEY]


def _evaluated_before(trial: optuna.Trial, study: HasTrials) -> FrozenTrial | None:
    return next((seen for seen in evaluated_trials(study) if seen.params == trial.params), None)


def _trial(trial: optuna.Trial, number: int) -> FrozenTrial:
    return trial.study.get_trials(deepcopy=False)[number]


def _described(prediction: Prediction) -> dict[str, Any]:
    simulated = prediction.simulated
    return {
        _DRAFT_KEY: simulated.config.details,
        CONFIG_KEY: simulated.config.to_json(),
        ACCEPTANCE_KEY: prediction.acceptance,
        PREDICTED_KEY: simulated.speedup,
        DRAFT_COST_KEY: prediction.draft_cost,
        COMPLETE_KEY: prediction.complete,
        _SECONDS_BY_TEXT_KEY: simulated.seconds,
        "predicted_acceptance_rate": simulated.acceptance_rate,
        "texts": len(simulated.seconds),
    }


def _note(trial: optuna.Trial, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        trial.set_user_attr(name, value)


def _enqueue_again(trial: optuna.Trial) -> None:
    """Let a resumed study try what an interrupted trial was to try."""
    attributes = {SOURCE_KEY: trial.user_attrs.get(SOURCE_KEY, f"interrupted trial {trial.number}")}
    if MEASURES_KEY in trial.user_attrs:
        attributes[MEASURES_KEY] = trial.user_attrs[MEASURES_KEY]
    # An enqueued trial that was interrupted while it chose has chosen in part only.
    chosen = _trial(trial, trial.number).system_attrs.get("fixed_params", trial.params)
    trial.study.enqueue_trial(chosen, user_attrs=attributes)
