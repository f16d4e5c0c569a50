"""Studies: creating one, and making sure that a resumed one still means the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from layerskip.errors import InvalidInputError
from layerskip.utils import library_versions
from studies.ranking import (
    HasTrials,
    Standing,
    basis_of,
    best_trials,
    candidate_key,
    completed_trials,
    measured_trials,
    seen_trials,
    speedup_of,
)
from studies.records import MeasurementRecord
from studies.statistics import Speedup, speedup_of_all
from studies.storage import ReconnectingStorage

_CONTEXT_KEY = "layerskip"
# What a study's description tells of a trial, as far as the trial says it.
_DESCRIBED = ("predicted_speedup", "acceptance", "acceptance_rate", "skip_set", "draft", "source")
_FORMAT = 3
# Attributes of a study: the versions of what it was searched with, one after the other;
VERSIONS_KEY = "versions"
# what the parts of a step cost, as layerskip.costs.CostModel writes it; a study that has it is not measured for;
COSTS_KEY = "latency"
# and the acceptance rate of drafts that skip a single sublayer, by what they skip.
ALONE_KEY = "acceptance_alone"
_NEWER = "was made by a newer version of layerskip; update layerskip"


@dataclass(frozen=True)
class StudyContext:
    """What the values of a study depend on. Trials that differ in any of it cannot be compared.

    Args:
        model: Id of the model, for people.
        fingerprint: Hash of the model's configuration and weights.
        dtype: Floating-point type of the model.
        device: What it runs on.
        prompts: Hash of the prompts and of which are held out.
        max_new_tokens: Tokens generated for each prompt.
        prompts_per_trial: Prompts that each trial decodes.
        space: Description of the search space.
    """

    model: str
    fingerprint: str
    dtype: str
    device: str
    prompts: str
    max_new_tokens: int
    prompts_per_trial: int
    space: dict[str, Any]

    @property
    def digest(self) -> str:
        """A short hash of everything but the model's id."""
        values = {name: value for name, value in asdict(self).items() if name != "model"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def differences(self, recorded: dict[str, Any]) -> list[str]:
        """How this context differs from a recorded one, a phrase each."""
        return [
            f"{name} (study: {recorded.get(name)}, now: {value})"
            for name, value in asdict(self).items()
            if name != "model" and recorded.get(name) != value
        ]


def open_study(storage: ReconnectingStorage, name: str, context: StudyContext) -> optuna.Study:
    """Create a study that maximizes the speedup, or resume the study of that name.

    Args:
        storage: Where it lives.
        name: Its name.
        context: What its values depend on.

    Raises:
        InvalidInputError: A study of that name exists, and was made in another context or by something else.
    """
    study = _open(storage, name, context)
    earlier, now = study.user_attrs.get(VERSIONS_KEY, []), library_versions()
    if now not in earlier:
        study.set_user_attr(VERSIONS_KEY, [*earlier, now])
    return study


def _open(storage: ReconnectingStorage, name: str, context: StudyContext) -> optuna.Study:
    study = optuna.create_study(
        study_name=name, storage=storage, direction=StudyDirection.MAXIMIZE, load_if_exists=True
    )
    recorded = study.user_attrs.get(_CONTEXT_KEY)
    if recorded is None and not study.get_trials(deepcopy=False) and _maximizes(study):
        study.set_user_attr(_CONTEXT_KEY, {"format": _FORMAT, **asdict(context)})
        return study
    if recorded is None:  # another worker may have made it in between
        recorded = study.user_attrs.get(_CONTEXT_KEY, {})
    if _is_newer(recorded):
        raise InvalidInputError(f"study '{name}': {_NEWER}, or choose another name with --study")
    if recorded.get("format") != _FORMAT or not _maximizes(study):
        raise InvalidInputError(
            f"study '{name}': was not made by this version of layerskip; choose another name with --study"
        )
    differences = context.differences(recorded)
    if differences:
        raise InvalidInputError(
            f"study '{name}': cannot go on, because this differs: {'; '.join(differences)}. "
            "Search with what the study was made with, or choose another name with --study"
        )
    return study


def _is_newer(recorded: dict[str, Any]) -> bool:
    return isinstance(recorded.get("format"), int) and recorded["format"] > _FORMAT


def _maximizes(study: optuna.Study) -> bool:
    return study.directions == [StudyDirection.MAXIMIZE]


def context_of(study: optuna.Study) -> dict[str, Any]:
    """What a study's values depend on: the fields of :class:`StudyContext`.

    Raises:
        InvalidInputError: This version of layerskip did not make it.
    """
    recorded: dict[str, Any] = study.user_attrs.get(_CONTEXT_KEY, {})
    if _is_newer(recorded):
        raise InvalidInputError(f"study '{study.study_name}': {_NEWER}")
    if recorded.get("format") != _FORMAT:
        raise InvalidInputError(f"study '{study.study_name}': was not made by this version of layerskip; search anew")
    return recorded


@dataclass(frozen=True)
class StudySummary:
    """A study at a glance.

    Args:
        name: Its name.
        model: Id of its model; None if layerskip did not make it.
        trials: Trials that ran or run.
        seen: Candidates looked at.
        measured: Candidates decoded for real.
        best_speedup: The highest speedup of finalists on held-out prompts; without any, that of the best candidate.
        basis: What that figure rests on.
    """

    name: str
    model: str | None
    trials: int
    seen: int
    measured: int
    best_speedup: float | None
    basis: Standing | None


def list_studies(storage: ReconnectingStorage) -> list[StudySummary]:
    """All studies of a storage, by name."""
    return sorted((_summary(storage, study) for study in _studies(storage)), key=lambda summary: summary.name)


def studies_of_ours(storage: ReconnectingStorage) -> list[str]:
    """Names of the studies that this version of layerskip made."""
    ours = [study for study in _studies(storage) if study.user_attrs.get(_CONTEXT_KEY, {}).get("format") == _FORMAT]
    return sorted(study.study_name for study in ours)


def _studies(storage: ReconnectingStorage) -> list[optuna.Study]:
    return [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage=storage)]


def _summary(storage: ReconnectingStorage, study: optuna.Study) -> StudySummary:
    speedup, basis = _best_figure(storage, study) if _maximizes(study) else (None, None)
    return StudySummary(
        name=study.study_name,
        model=study.user_attrs.get(_CONTEXT_KEY, {}).get("model"),
        trials=sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)),
        seen=len(seen_trials(study)),
        measured=len(measured_trials(study)),
        best_speedup=speedup,
        basis=basis,
    )


def _best_figure(storage: ReconnectingStorage, study: optuna.Study) -> tuple[float, Standing] | tuple[None, None]:
    """The speedup that a report would tell of a study, and what it rests on."""
    finals = held_out_speedups(study, storage.records.of(study.study_name))
    if finals:
        return max(final.value for final in finals.values()), "held-out"
    best = best_trials(study, 1)
    return (speedup_of(best[0]), basis_of(best[0])) if best else (None, None)


def load_study(storage: ReconnectingStorage, name: str) -> optuna.Study:
    """An existing study.

    Raises:
        InvalidInputError: There is none of that name; the message lists those that are.
    """
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        names = ", ".join(sorted(optuna.get_all_study_names(storage=storage))) or "none"
        raise InvalidInputError(f"study '{name}': no such study in this storage; studies there: {names}") from error


def describe_study(storage: ReconnectingStorage, name: str, best: int) -> dict[str, Any]:
    """What there is to say about a study, as plain values.

    Args:
        storage: Where the study lives.
        name: Its name.
        best: Number of best trials to describe.

    Raises:
        InvalidInputError: There is no study of that name, or a newer version of layerskip made it.
    """
    study = load_study(storage, name)
    context = study.user_attrs.get(_CONTEXT_KEY, {})
    if _is_newer(context):
        raise InvalidInputError(f"study '{name}': {_NEWER}")
    records = storage.records.of(name)
    held_out = held_out_speedups(study, records)

    def described(trial: FrozenTrial) -> dict[str, Any]:
        told: dict[str, Any] = {"number": trial.number, "speedup": speedup_of(trial), "basis": basis_of(trial)}
        final = held_out.get(candidate_key(trial))
        told |= {"held_out_speedup": final.value if final else None}
        return told | {key: trial.user_attrs.get(key) for key in _DESCRIBED}

    return {
        "study": name,
        "context": context,
        "trials": dict(Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))),
        "measurements": len(records),
        "best": [described(trial) for trial in (best_trials(study, best) if _maximizes(study) else [])],
    }


def held_out_speedups(study: HasTrials, records: Sequence[MeasurementRecord]) -> dict[str, Speedup]:
    """What candidates measured on held-out prompts, of all times that they were, whichever of their trials it was.

    Args:
        study: The study, or a snapshot of it.
        records: Everything that was measured in it.

    Returns:
        By :func:`studies.ranking.candidate_key`.
    """
    candidates = {trial.number: candidate_key(trial) for trial in completed_trials(study)}
    finals: dict[str, list[MeasurementRecord]] = {}
    for record in records:
        if record.prompt_set == "held-out" and record.trial in candidates:
            finals.setdefault(candidates[record.trial], []).append(record)
    return {candidate: speedup_of_all(ones) for candidate, ones in finals.items()}
