"""One trial: a candidate's speedup is predicted, and if that is promising, measured."""

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
from search.measure import ExpectedSeconds, Measurement, summarize
from search.predict import Prediction, SpeedupPredictor
from search.prompts import EncodedPrompt
from search.pruner import SECONDS_KEY
from search.space import SearchSpace
from studies.ranking import (
    ACCEPTANCE_KEY,
    CONFIG_KEY,
    DRAFT_COST_KEY,
    FULLY_TRACED_KEY,
    PREDICTED_HERE_KEY,
    PREDICTION_STEP,
    REVISITS_KEY,
    SOURCE_KEY,
    HasTrials,
    Snapshot,
    predicted_trials,
    prediction_of,
)

# Names the sampler that proposed a trial, where there is no other source.
SAMPLER_KEY = "sampler"
# The draft configuration but for its skip set, for people.
_DRAFT_KEY = "draft"
_SECONDS_BY_TEXT_KEY = "predicted_seconds"
# What is copied where a candidate was predicted before.
_PREDICTED = (_DRAFT_KEY, CONFIG_KEY, ACCEPTANCE_KEY, DRAFT_COST_KEY, FULLY_TRACED_KEY, _SECONDS_BY_TEXT_KEY)

Measure = Callable[[int, DraftConfig, Sequence[EncodedPrompt], ExpectedSeconds], Iterator[Measurement]]


@dataclass(frozen=True)
class Objective:
    """What Optuna calls for each trial: predicts the speedup of what it chose, and measures it unless it is pruned.

    Intermediate values are as in :mod:`studies.ranking`.

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
        candidate = self._suggested(trial)
        known = _predicted_before(trial, Snapshot(trial.study))
        if known is not None and REVISITS_KEY in trial.user_attrs and not known.user_attrs[FULLY_TRACED_KEY]:
            known = None  # it was given up early, and is to be measured all the same
        if known is None:
            speedup = self._predict(trial, candidate)
        else:
            speedup = prediction_of(known)
            _set_attributes(trial, {key: known.user_attrs[key] for key in _PREDICTED} | {"predicted_by": known.number})
        trial.report(speedup, PREDICTION_STEP)
        if trial.should_prune():
            raise optuna.TrialPruned
        return self._measured(trial, speedup)

    def _suggested(self, trial: optuna.Trial) -> DraftConfig:
        try:
            candidate = self.space.suggest(trial)
        except InvalidInputError as error:  # every sublayer skipped
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("skip_set", str(candidate.skip_set))
        if SOURCE_KEY not in trial.user_attrs:
            trial.set_user_attr(SAMPLER_KEY, self.sampler)
        return candidate

    def _predict(self, trial: optuna.Trial, candidate: DraftConfig) -> float:
        to_beat = () if REVISITS_KEY in trial.user_attrs else _best_predicted(Snapshot(trial.study))
        with self.lock.shared():
            prediction = self.predictor.predict(candidate, to_beat=to_beat)
        _set_attributes(trial, _described(prediction))
        return prediction.speedup

    def _measured(self, trial: optuna.Trial, predicted: float) -> float:
        """Decode prompts in random order until all are done, or the candidate is clearly slower than the best one."""
        config = DraftConfig.from_json(trial.user_attrs[CONFIG_KEY])
        expected = [prompt.id for prompt in self.prompts], trial.user_attrs[_SECONDS_BY_TEXT_KEY]
        seconds = dict(zip(*expected, strict=False))  # the texts scored begin with the prompts measured
        steps = {prompt.id: step for step, prompt in enumerate(self.prompts, start=PREDICTION_STEP + 1)}
        prompts = random.Random(trial.number).sample(self.prompts, len(self.prompts))
        started = time.perf_counter()
        measured: list[Measurement] = []
        stopped = False
        with self.lock.exclusive():
            for measurement in self.measure(trial.number, config, prompts, seconds):
                measured.append(measurement)
                trial.report(measurement.speedup, steps[measurement.prompt])
                stopped = len(measured) < len(prompts) and trial.should_prune()
                if stopped:
                    break
        summary = summarize(measured)
        done = {measurement.prompt for measurement in measured}
        places = [place for place, prompt in enumerate(self.prompts) if prompt.id in done]
        share = share_of_speedup(self.predictor.plain_seconds(), trial.user_attrs[_SECONDS_BY_TEXT_KEY], places)
        more = {SECONDS_KEY: time.perf_counter() - started, PREDICTED_HERE_KEY: predicted * share}
        _set_attributes(trial, asdict(summary) | more)
        if stopped:
            raise optuna.TrialPruned
        return summary.speedup


def share_of_speedup(plain: Sequence[float], draft: Sequence[float], places: Sequence[int]) -> float:
    """The speedup on some texts, over that on all; 1 where none of them was predicted.

    Args:
        plain: Predicted seconds of plain decoding for each text.
        draft: Of drafting, for the first of these texts, those that it was predicted on.
        places: Some of them.
    """
    known = [place for place in places if place < len(draft)]
    if not known:
        return 1.0
    here = sum(plain[place] for place in known) / sum(draft[place] for place in known)
    return here * sum(draft) / sum(plain[: len(draft)])


def _best_predicted(study: HasTrials) -> Sequence[float]:
    """The seconds that each text was predicted to take with the best candidate that was traced on all texts."""
    traced = [trial for trial in predicted_trials(study) if trial.user_attrs[FULLY_TRACED_KEY]]
    best = max(traced, key=prediction_of, default=None)
    return () if best is None else best.user_attrs[_SECONDS_BY_TEXT_KEY]


def _predicted_before(trial: optuna.Trial, study: HasTrials) -> FrozenTrial | None:
    return next((earlier for earlier in predicted_trials(study) if earlier.params == trial.params), None)


def _described(prediction: Prediction) -> dict[str, Any]:
    policy = prediction.simulated
    return {
        _DRAFT_KEY: policy.config.details,
        CONFIG_KEY: policy.config.to_json(),
        ACCEPTANCE_KEY: prediction.acceptance,
        DRAFT_COST_KEY: prediction.draft_cost,
        FULLY_TRACED_KEY: prediction.complete,
        _SECONDS_BY_TEXT_KEY: policy.seconds,
        "predicted_acceptance_rate": policy.acceptance_rate,
        "texts": len(policy.seconds),
    }


def _set_attributes(trial: optuna.Trial, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        trial.set_user_attr(name, value)
