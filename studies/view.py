"""A study read once, as plain values for figures and reports."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial

from layerskip.skip_set import SkipSet
from studies.ranking import (
    DRAFT_COST_KEY,
    PREDICTED_KEY,
    STOPPED_KEY,
    Basis,
    BestBasis,
    Snapshot,
    basis_of,
    best_trials,
    candidate_key,
    completed_trials,
    correction_of,
    speedup_of,
)
from studies.records import MeasurementRecord
from studies.statistics import Speedup
from studies.step_costs import RelativeParts, read_parts
from studies.storage import ReconnectingStorage
from studies.study import LATENCY_KEY, SINGLE_SUBLAYER_KEY, VERSIONS_KEY, context_of, held_out_speedups, load_study

_BIT = re.compile(r"skip_(attn|mlp)_(\d+)")
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
        skip_set: What it leaves out.
        bridged: Whether it has bridges.
        vocabulary: Size of its draft vocabulary; 0 is the whole one.
        draft: Everything else about the draft, for people.
        source: Who proposed it.
        stopped: Whether it was found hopeless and stopped after some prompts.
        held_out: What it measured on held-out prompts, if it is a finalist.
        trained: Whether a trained stand-in runs in place of the top of what it leaves out.
    """

    number: int
    candidate: str
    basis: Basis
    speedup: Speedup
    predicted: float | None
    acceptance: float | None
    draft_cost: float | None
    skip_set: SkipSet
    bridged: bool
    vocabulary: int
    draft: str
    source: str
    stopped: bool
    held_out: Speedup | None = None
    trained: bool = False

    @property
    def best_basis(self) -> BestBasis:
        """The basis of its best speedup."""
        return "held-out" if self.held_out else self.basis

    @property
    def best_speedup(self) -> Speedup:
        """Its most trustworthy speedup: on held-out prompts, or else measured, or else predicted."""
        return self.held_out or self.speedup

    @property
    def label(self) -> str:
        """Its best speedup with the basis, such as ``0.960× held-out``."""
        return f"{self.best_speedup.value:.3f}× {self.best_basis}"


@dataclass(frozen=True)
class StudyView:
    """A study at one moment.

    Args:
        name: Its name.
        context: What its values depend on, see :class:`studies.study.StudyContext`.
        versions: Library versions that it was searched with, in order.
        num_layers: Decoder layers of the model.
        trials: Completed trials, by number.
        ranked: The best trial of each candidate: finalists by their speedup on held-out prompts, then the others.
        correction: Median of measured ÷ predicted speedup; 1 without measurements.
        measurements: Every measured prompt.
        single_sublayer_acceptance: Acceptance rate of drafts that skip a single sublayer, by its index in the stack.
        parts: What the parts of a step cost; None if that was not measured.
        states: Number of trials in each state.
        began: When its first trial started; None if none did.
        ended: When its last trial so far ended.
    """

    name: str
    context: Mapping[str, Any]
    versions: Sequence[Mapping[str, str]]
    num_layers: int
    trials: Sequence[TrialSummary]
    ranked: Sequence[TrialSummary]
    correction: float
    measurements: Sequence[MeasurementRecord]
    single_sublayer_acceptance: Mapping[int, float]
    parts: RelativeParts | None
    states: Mapping[str, int]
    began: datetime | None
    ended: datetime | None

    @property
    def evaluated(self) -> Sequence[TrialSummary]:
        """The first prediction of each candidate."""
        first: dict[str, TrialSummary] = {}
        for trial in self.trials:
            if trial.basis == "predicted":
                first.setdefault(trial.candidate, trial)
        return list(first.values())

    @property
    def measured(self) -> Sequence[TrialSummary]:
        """Trials that measured a candidate."""
        return [trial for trial in self.trials if trial.basis == "measured"]


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
    tried = {trial.number: _tried(trial, num_layers, finals, costs) for trial in completed_trials(now)}
    attributes = study.user_attrs
    trials = now.get_trials()
    return StudyView(
        name=name,
        context=context,
        versions=attributes.get(VERSIONS_KEY, []),
        num_layers=num_layers,
        trials=list(tried.values()),
        ranked=sorted(
            (tried[trial.number] for trial in best_trials(now, len(tried))),
            key=lambda trial: trial.held_out.value if trial.held_out else 0.0,
            reverse=True,  # finalists first; the sort is stable
        ),
        correction=correction_of(now),
        measurements=records,
        single_sublayer_acceptance=_by_index(attributes.get(SINGLE_SUBLAYER_KEY, {})),
        parts=read_parts(attributes.get(LATENCY_KEY)),
        states=Counter(trial.state.name.lower() for trial in trials),
        began=min((trial.datetime_start for trial in trials if trial.datetime_start), default=None),
        ended=max((trial.datetime_complete for trial in trials if trial.datetime_complete), default=None),
    )


def _draft_costs(study: Snapshot) -> dict[str, float]:
    """By candidate: it is noted where one is looked at, not where it is measured."""
    trials = completed_trials(study)
    return {candidate_key(t): t.user_attrs[DRAFT_COST_KEY] for t in trials if DRAFT_COST_KEY in t.user_attrs}


def _tried(
    trial: FrozenTrial, num_layers: int, finals: Mapping[str, Speedup], costs: Mapping[str, float]
) -> TrialSummary:
    told, candidate, value = trial.user_attrs, candidate_key(trial), speedup_of(trial)
    return TrialSummary(
        number=trial.number,
        candidate=candidate,
        basis=basis_of(trial),
        speedup=Speedup(value, told.get("speedup_low", value), told.get("speedup_high", value)),
        predicted=told.get(PREDICTED_KEY),
        acceptance=told.get("acceptance"),
        draft_cost=costs.get(candidate),
        skip_set=_skip_set(trial.params, num_layers),
        bridged=bool(trial.params.get("bridged", False)),
        vocabulary=int(trial.params.get("vocabulary", 0)),
        draft=str(told.get("draft_exit", "")),
        source=str(told.get("source") or told.get("sampler") or "sampler"),
        stopped=STOPPED_KEY in told,
        held_out=finals.get(candidate),
        trained=bool(trial.params.get("stand_in", 0)),
    )


def _skip_set(parameters: Mapping[str, Any], num_layers: int) -> SkipSet:
    bits = {match.groups(): bool(value) for name, value in parameters.items() if (match := _BIT.fullmatch(name))}
    skipped = {(kind, int(layer)) for (kind, layer), skip in bits.items() if skip}
    attention, mlp = (tuple(layer for of, layer in sorted(skipped) if of == kind) for kind in _KINDS)
    return SkipSet(num_layers, attention, mlp)


def _by_index(recorded: Mapping[str, float]) -> dict[int, float]:
    """Rates by a sublayer's index, from rates by its name, such as ``attn 3``."""
    rates = {}
    for skipped, rate in recorded.items():
        kind, _, layer = skipped.partition(" ")
        if kind in _KINDS and layer.isdecimal():
            rates[2 * int(layer) + _KINDS.index(kind)] = float(rate)
    return rates
