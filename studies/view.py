"""A study as its pictures need it: plain values, read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial

from layerskip.costs import CostModel, Costs
from layerskip.drafting.config import DraftConfig
from studies.ranking import (
    DRAFT_COST_KEY,
    PREDICTED_KEY,
    STOPPED_KEY,
    Basis,
    Snapshot,
    Standing,
    basis_of,
    best_trials,
    candidate_key,
    completed_trials,
    config_of,
    correction_of,
    speedup_of,
)
from studies.records import MeasurementRecord
from studies.statistics import Speedup
from studies.storage import ReconnectingStorage
from studies.study import ALONE_KEY, COSTS_KEY, VERSIONS_KEY, context_of, held_out_speedups, load_study

_KINDS = ("attn", "mlp")


@dataclass(frozen=True)
class TrialSummary:
    """A completed trial.

    Args:
        number: Its number.
        candidate: The same for trials of the same candidate.
        basis: Whether its speedup was measured or predicted.
        speedup: That speedup, with its interval where it was measured on several prompts.
        predicted: What was predicted of it.
        acceptance: The one-step acceptance rate α that it was looked at with.
        draft_cost: What a draft step costs, c, in units of a plain step; None where that was not kept.
        config: How it drafts.
        source: Who proposed it.
        stopped: Whether it was found hopeless and stopped after some prompts.
        held_out: What it measured on held-out prompts, if it is a finalist.
    """

    number: int
    candidate: str
    basis: Basis
    speedup: Speedup
    predicted: float | None
    acceptance: float | None
    draft_cost: float | None
    config: DraftConfig
    source: str
    stopped: bool
    held_out: Speedup | None = None

    @property
    def standing(self) -> Standing:
        """What the best figure for it rests on."""
        return "held-out" if self.held_out else self.basis

    @property
    def figure(self) -> Speedup:
        """The best figure for it: held out, or else measured, or else predicted."""
        return self.held_out or self.speedup

    @property
    def told(self) -> str:
        """That figure with what it rests on, as ``0.96× held-out``."""
        return f"{self.figure.value:.3f}× {self.standing}"


@dataclass(frozen=True)
class StudyView:
    """A study at one moment.

    Args:
        name: Its name.
        context: What its values depend on, see :class:`studies.study.StudyContext`.
        versions: Of what it was searched with, one after the other.
        num_layers: Decoder layers of the model.
        tried: Completed trials, by number.
        ranked: The best trial of each candidate: finalists by what they measured on held-out prompts, then the others.
        correction: By how much predictions were off where candidates were measured.
        measurements: Every prompt that was measured.
        alone: Acceptance rate of drafts that skip one sublayer alone, by the sublayer's index in the stack.
        costs: What passes cost halfway between the lengths measured, in seconds; None if nothing was measured.
        states: Number of trials in each state.
        began: When its first trial started; None if none did.
        ended: When its last trial so far ended.
    """

    name: str
    context: Mapping[str, Any]
    versions: Sequence[Mapping[str, str]]
    num_layers: int
    tried: Sequence[TrialSummary]
    ranked: Sequence[TrialSummary]
    correction: float
    measurements: Sequence[MeasurementRecord]
    alone: Mapping[int, float]
    costs: Costs | None
    states: Mapping[str, int]
    began: datetime | None
    ended: datetime | None

    @property
    def seen(self) -> Sequence[TrialSummary]:
        """The first look at each candidate."""
        looks: dict[str, TrialSummary] = {}
        for one in self.tried:
            if one.basis == "predicted":
                looks.setdefault(one.candidate, one)
        return list(looks.values())

    @property
    def measured(self) -> Sequence[TrialSummary]:
        """Trials that decoded for real."""
        return [one for one in self.tried if one.basis == "measured"]

    def records_of(self, number: int, prompt_set: str) -> Sequence[MeasurementRecord]:
        """The measurements of a trial on the search's or the held-out prompts."""
        return [one for one in self.measurements if (one.trial, one.prompt_set) == (number, prompt_set)]


def view_study(storage: ReconnectingStorage, name: str) -> StudyView:
    """Read a study.

    Args:
        storage: Where it lives.
        name: Its name.

    Raises:
        InvalidInputError: There is no study of that name, or layerskip, or this version of it, did not make it.
    """
    study = load_study(storage, name)
    context = context_of(study)
    now = Snapshot(study)
    records = storage.records.of(name)
    num_layers = int(context["space"]["num_layers"])
    finals, costs = held_out_speedups(now, records), _draft_costs(now)
    tried = {trial.number: _tried(trial, finals, costs) for trial in completed_trials(now)}
    attributes = study.user_attrs
    trials = now.get_trials()
    return StudyView(
        name=name,
        context=context,
        versions=attributes.get(VERSIONS_KEY, []),
        num_layers=num_layers,
        tried=list(tried.values()),
        ranked=sorted(
            (tried[trial.number] for trial in best_trials(now, len(tried))),
            key=lambda one: one.held_out.value if one.held_out else 0.0,
            reverse=True,  # finalists first; the sort is stable
        ),
        correction=correction_of(now),
        measurements=records,
        alone=_alone(attributes.get(ALONE_KEY, {})),
        costs=costs_from(attributes.get(COSTS_KEY)),
        states=Counter(trial.state.name.lower() for trial in trials),
        began=min((trial.datetime_start for trial in trials if trial.datetime_start), default=None),
        ended=max((trial.datetime_complete for trial in trials if trial.datetime_complete), default=None),
    )


def _draft_costs(study: Snapshot) -> dict[str, float]:
    """By candidate: it is noted where one is looked at, not where it is measured."""
    trials = completed_trials(study)
    return {candidate_key(t): t.user_attrs[DRAFT_COST_KEY] for t in trials if DRAFT_COST_KEY in t.user_attrs}


def _tried(trial: FrozenTrial, finals: Mapping[str, Speedup], costs: Mapping[str, float]) -> TrialSummary:
    told, candidate, value = trial.user_attrs, candidate_key(trial), speedup_of(trial)
    return TrialSummary(
        number=trial.number,
        candidate=candidate,
        basis=basis_of(trial),
        speedup=Speedup(value, told.get("speedup_low", value), told.get("speedup_high", value)),
        predicted=told.get(PREDICTED_KEY),
        acceptance=told.get("acceptance"),
        draft_cost=costs.get(candidate),
        config=config_of(trial),
        source=str(told.get("source") or told.get("sampler") or "sampler"),
        stopped=STOPPED_KEY in told,
        held_out=finals.get(candidate),
    )


def costs_from(kept: str | None) -> Costs | None:
    """Costs halfway between the two text lengths at which a search measured them.

    Args:
        kept: The JSON of a :class:`layerskip.costs.CostModel`.

    Returns:
        None where nothing was kept, or another form.
    """
    try:
        model = CostModel.from_json(kept or "")
    except ValueError:
        return None
    return model.at((model.short.context + model.long.context) / 2)


def _alone(recorded: Mapping[str, float]) -> dict[int, float]:
    """By index, from rates by what was skipped, such as ``attn 3``."""
    rates = {}
    for skipped, rate in recorded.items():
        kind, _, layer = skipped.partition(" ")
        if kind in _KINDS and layer.isdecimal():
            rates[2 * int(layer) + _KINDS.index(kind)] = float(rate)
    return rates
