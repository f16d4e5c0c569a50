"""A study read once, as plain values for figures and reports."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial

from layerskip.costs import CostModel, Costs
from layerskip.drafting.config import DraftConfig
from studies.ranking import (
    ACCEPTANCE_KEY,
    DRAFT_COST_KEY,
    REVISITS_KEY,
    SOURCE_KEY,
    Basis,
    BestBasis,
    Snapshot,
    basis_of,
    candidate_key,
    completed_trials,
    config_of,
    is_stopped,
    predicted_trials,
    prediction_for_measured_prompts,
    prediction_of,
    speedup_of,
)
from studies.records import MeasurementRecord
from studies.statistics import Speedup
from studies.storage import ReconnectingStorage
from studies.study import (
    COSTS_KEY,
    SINGLE_SUBLAYER_KEY,
    VERSIONS_KEY,
    context_of,
    held_out_speedups,
    load_study,
    ranked_trials,
)

_KINDS = ("attn", "mlp")


@dataclass(frozen=True)
class TrialSummary:
    """A finished trial with a prediction.

    Args:
        number: Its number.
        candidate: The same for trials of the same candidate.
        basis: Whether its speedup was measured or predicted.
        speedup: That speedup, with its interval if it was measured on several prompts.
        predicted: Its predicted speedup.
        predicted_here: The one predicted for the prompts that it measured; without measurements, ``predicted``.
        acceptance: The one-step acceptance rate α of its prediction.
        draft_cost: c, the cost of a draft step in units of a plain step; None if that was not stored.
        config: How it drafts.
        source: The warm start or sampler that proposed it.
        stopped: Whether its measurement was stopped early, because it could not win.
        revisits: Whether an earlier trial predicted the same candidate, and it was enqueued again to be measured.
        held_out: Its speedup on held-out prompts, if it is a finalist.
    """

    number: int
    candidate: str
    basis: Basis
    speedup: Speedup
    predicted: float
    predicted_here: float
    acceptance: float | None
    draft_cost: float | None
    config: DraftConfig
    source: str
    stopped: bool
    revisits: bool = False
    held_out: Speedup | None = None

    @property
    def best_basis(self) -> BestBasis:
        """The basis of its best speedup."""
        return "held-out" if self.held_out else self.basis

    @property
    def best_speedup(self) -> Speedup:
        """Its most trustworthy speedup: on held-out prompts, or else measured, or else predicted."""
        return self.held_out or self.speedup

    @property
    def as_predicted(self) -> TrialSummary:
        """The trial as it was before it was measured."""
        return replace(self, basis="predicted", speedup=Speedup(self.predicted, self.predicted, self.predicted))

    @property
    def label(self) -> str:
        """Its best speedup with the basis, such as ``0.960× held-out``."""
        return f"{self.best_speedup.value:.3f}× {self.best_basis}"


@dataclass(frozen=True)
class StudyView:
    """A study at one moment.

    Args:
        name: Its name.
        context: Its conditions, see :class:`studies.study.StudyContext`.
        versions: Library versions that it was searched with, in order.
        num_layers: Decoder layers of the model.
        trials: Finished trials with a prediction, by number.
        ranked: The best trial of each candidate: finalists by their speedup on held-out prompts, then the others.
        measured_over_predicted: Median of the measured ÷ the predicted speedups, both of the prompts that were
            measured; None without measurements.
        measurements: Every measured prompt.
        single_sublayer_acceptance: Acceptance rate of drafts that skip a single sublayer, by its index in the stack.
        costs: What passes cost after the shorter of the texts measured, in seconds; None if nothing was measured.
        states: Number of trials in each state.
        began: Start of its first trial; None if none started.
        ended: End of its last trial so far.
    """

    name: str
    context: Mapping[str, Any]
    versions: Sequence[Mapping[str, str]]
    num_layers: int
    trials: Sequence[TrialSummary]
    ranked: Sequence[TrialSummary]
    measured_over_predicted: float | None
    measurements: Sequence[MeasurementRecord]
    single_sublayer_acceptance: Mapping[int, float]
    costs: Costs | None
    states: Mapping[str, int]
    began: datetime | None
    ended: datetime | None

    @property
    def evaluated(self) -> Sequence[TrialSummary]:
        """Trials that predicted a candidate, and not those that measure one that an earlier trial predicted."""
        return [trial for trial in self.trials if not trial.revisits]

    @property
    def measured(self) -> Sequence[TrialSummary]:
        """Trials that measured a candidate, if only on some prompts."""
        return [trial for trial in self.trials if trial.basis == "measured"]


def view_study(storage: ReconnectingStorage, name: str) -> StudyView:
    """Read a study.

    Args:
        storage: Where it lives.
        name: Its name.

    Raises:
        InvalidInputError: There is no study of that name, or this version of layerskip did not make it.
    """
    study = load_study(storage, name)
    context = context_of(study)
    now = Snapshot(study)
    records = storage.records.of(name)
    num_layers = int(context["space"]["num_layers"])
    held_out = held_out_speedups(now, records)
    summaries = {trial.number: _summary(trial, held_out) for trial in predicted_trials(now)}
    attributes = study.user_attrs
    trials = now.get_trials()
    return StudyView(
        name=name,
        context=context,
        versions=attributes.get(VERSIONS_KEY, []),
        num_layers=num_layers,
        trials=list(summaries.values()),
        ranked=[summaries[trial.number] for trial in ranked_trials(now, held_out)],
        measured_over_predicted=_measured_over_predicted(now),
        measurements=records,
        single_sublayer_acceptance=_by_index(attributes.get(SINGLE_SUBLAYER_KEY, {})),
        costs=costs_from(attributes.get(COSTS_KEY)),
        states=Counter(trial.state.name.lower() for trial in trials),
        began=min((trial.datetime_start for trial in trials if trial.datetime_start), default=None),
        ended=max((trial.datetime_complete for trial in trials if trial.datetime_complete), default=None),
    )


def _measured_over_predicted(study: Snapshot) -> float | None:
    ratios = [trial.values[0] / prediction_for_measured_prompts(trial) for trial in completed_trials(study)]
    return statistics.median(ratios) if ratios else None


def _summary(trial: FrozenTrial, held_out: Mapping[str, Speedup]) -> TrialSummary:
    attributes, candidate, value = trial.user_attrs, candidate_key(trial), speedup_of(trial)
    return TrialSummary(
        number=trial.number,
        candidate=candidate,
        basis=basis_of(trial),
        speedup=Speedup(value, attributes.get("speedup_low", value), attributes.get("speedup_high", value)),
        predicted=prediction_of(trial),
        predicted_here=prediction_for_measured_prompts(trial),
        acceptance=attributes.get(ACCEPTANCE_KEY),
        draft_cost=attributes.get(DRAFT_COST_KEY),
        config=config_of(trial),
        source=str(attributes.get(SOURCE_KEY) or attributes.get("sampler") or "sampler"),
        stopped=is_stopped(trial),
        revisits=REVISITS_KEY in attributes,
        held_out=held_out.get(candidate),
    )


def costs_from(kept: str | None) -> Costs | None:
    """Costs after the shorter of the two texts after which a search measured them, which is about as long as its own.

    Args:
        kept: The JSON of a :class:`layerskip.costs.CostModel`.

    Returns:
        None where nothing was kept, or another form.
    """
    try:
        return CostModel.from_json(kept or "").short
    except (ValueError, KeyError, ZeroDivisionError):
        return None


def _by_index(recorded: Mapping[str, float]) -> dict[int, float]:
    """Rates by a sublayer's index, from rates by its name, such as ``attn 3``."""
    rates = {}
    for skipped, rate in recorded.items():
        kind, _, layer = skipped.partition(" ")
        if kind in _KINDS and layer.isdecimal():
            rates[2 * int(layer) + _KINDS.index(kind)] = float(rate)
    return rates
