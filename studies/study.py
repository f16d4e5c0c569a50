"""Studies: creating and listing them, and refusing to resume a study under other conditions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from layerskip.errors import InvalidInputError
from layerskip.utils import library_versions
from studies.ranking import (
    BestBasis,
    HasTrials,
    basis_of,
    best_trials,
    candidate_key,
    evaluated_trials,
    is_given_up,
    measured_trials,
    predicted_trials,
    prediction_of,
    speedup_of,
)
from studies.records import MeasurementRecord
from studies.statistics import Speedup, speedup_of_all
from studies.storage import ReconnectingStorage, redacted

_CONTEXT_KEY = "layerskip"
# Attributes of a trial that a study's description includes.
_DESCRIBED = ("acceptance", "acceptance_rate", "skip_set", "draft", "source")
_FORMAT = 5
# Attributes of a study: library versions that it was searched with, in order;
VERSIONS_KEY = "versions"
# measured costs of passes, as layerskip.costs.CostModel writes them;
COSTS_KEY = "latency"
# acceptance rates of drafts that skip a single sublayer, by its name.
SINGLE_SUBLAYER_KEY = "acceptance_alone"
_NEWER = "was made by a newer version of layerskip; update layerskip"


@dataclass(frozen=True)
class StudyContext:
    """The conditions of a study. Trials under different conditions cannot be compared.

    Args:
        model: Id of the model, for display.
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
        """A short hash of all conditions but the model's id."""
        values = {name: value for name, value in asdict(self).items() if name != "model"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def differences(self, recorded: dict[str, Any]) -> list[str]:
        """How these conditions differ from recorded ones, a phrase each."""
        return [
            f"{name} (study: {recorded.get(name)}, now: {value})"
            for name, value in asdict(self).items()
            if name != "model" and recorded.get(name) != value
        ]


def check_name(name: str) -> None:
    """Refuse lone surrogates, as which Python reads bytes of a command line that are not UTF-8.

    Raises:
        InvalidInputError: The name has one.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"study {name!a}: character {error.start + 1} is not valid UTF-8") from error


def open_study(storage: ReconnectingStorage, name: str, context: StudyContext) -> optuna.Study:
    """Create a study that maximizes the speedup, or resume the study of that name.

    Args:
        storage: Where it lives.
        name: Its name.
        context: Its conditions.

    Raises:
        InvalidInputError: A study of that name exists, with other conditions or made by another program.
    """
    check_name(name)
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
    if recorded is None:  # another worker may have created it in between
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
            f"study '{name}': cannot be resumed, because this differs: {'; '.join(differences)}. "
            "Search under the study's conditions, or choose another name with --study"
        )
    return study


def _is_newer(recorded: dict[str, Any]) -> bool:
    return isinstance(recorded.get("format"), int) and recorded["format"] > _FORMAT


def _maximizes(study: optuna.Study) -> bool:
    return study.directions == [StudyDirection.MAXIMIZE]


def context_of(study: optuna.Study) -> dict[str, Any]:
    """The conditions of a study: the fields of :class:`StudyContext`.

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
    """A study in one line.

    Args:
        name: Its name.
        model: Id of its model; None if layerskip did not make it.
        trials: Trials that ran or are running.
        evaluated: Candidates evaluated.
        measured: Candidates measured.
        best_speedup: The highest speedup of finalists on held-out prompts; without any, that of the best candidate.
        basis: The basis of that speedup.
    """

    name: str
    model: str | None
    trials: int
    evaluated: int
    measured: int
    best_speedup: float | None
    basis: BestBasis | None


def list_studies(storage: ReconnectingStorage) -> list[StudySummary]:
    """All studies of a storage, by name."""
    return sorted((_summary(storage, study) for study in _studies(storage)), key=lambda summary: summary.name)


def our_studies(storage: ReconnectingStorage) -> list[str]:
    """Names of the studies that this version of layerskip made."""
    ours = [study for study in _studies(storage) if study.user_attrs.get(_CONTEXT_KEY, {}).get("format") == _FORMAT]
    return sorted(study.study_name for study in ours)


def _studies(storage: ReconnectingStorage) -> list[optuna.Study]:
    return [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage=storage)]


def _summary(storage: ReconnectingStorage, study: optuna.Study) -> StudySummary:
    speedup, basis = _best_speedup(storage, study) if _maximizes(study) else (None, None)
    return StudySummary(
        name=study.study_name,
        model=study.user_attrs.get(_CONTEXT_KEY, {}).get("model"),
        trials=sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)),
        evaluated=len(evaluated_trials(study)),
        measured=len(measured_trials(study)),
        best_speedup=speedup,
        basis=basis,
    )


def _best_speedup(storage: ReconnectingStorage, study: optuna.Study) -> tuple[float, BestBasis] | tuple[None, None]:
    """The speedup that a report would show for a study, and its basis."""
    held_out = held_out_speedups(study, storage.records.of(study.study_name))
    if held_out:
        return max(speedup.value for speedup in held_out.values()), "held-out"
    best = best_trials(study, 1)
    return (speedup_of(best[0]), basis_of(best[0])) if best else (None, None)


def load_study(storage: ReconnectingStorage, name: str) -> optuna.Study:
    """An existing study.

    Raises:
        InvalidInputError: There is no study of that name; the message lists the studies there are.
    """
    check_name(name)
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        names = sorted(optuna.get_all_study_names(storage=storage))
        there = ", ".join(names) if names else "none; --storage names another database"
        where = redacted(storage.engine.url)
        raise InvalidInputError(f"study '{name}': no such study in {where}; studies there: {there}") from error


def describe_study(storage: ReconnectingStorage, name: str, best: int) -> dict[str, Any]:
    """A study and its best trials, as values for JSON.

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
        speedup = held_out.get(candidate_key(trial))
        return {
            "number": trial.number,
            "speedup": speedup_of(trial),
            "basis": basis_of(trial),
            "predicted_speedup": prediction_of(trial),
            "held_out_speedup": speedup.value if speedup else None,
            "given_up": is_given_up(trial),
            **{key: trial.user_attrs.get(key) for key in _DESCRIBED},
        }

    return {
        "study": name,
        "context": context,
        "evaluated": len(evaluated_trials(study)),
        "measured": len(measured_trials(study)),
        "trials": dict(Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))),
        "measurements": len(records),
        "best": [described(trial) for trial in (ranked_trials(study, held_out)[:best] if _maximizes(study) else [])],
    }


def ranked_trials(study: HasTrials, held_out: Mapping[str, Speedup]) -> list[FrozenTrial]:
    """The best trial of each candidate: finalists by their speedup on held-out prompts, then the others.

    Args:
        study: The study, or a snapshot of it.
        held_out: From :func:`held_out_speedups`.
    """

    def on_held_out(trial: FrozenTrial) -> float:
        speedup = held_out.get(candidate_key(trial))
        return speedup.value if speedup else 0.0

    return sorted(best_trials(study), key=on_held_out, reverse=True)  # the sort is stable


def describe_trials(evaluated: int, measured: int, states: Mapping[str, int], measurements: int) -> str:
    """What a study's trials came to, in a line.

    Args:
        evaluated: Candidates that were predicted.
        measured: Those that trials measured.
        states: Trials by their state in Optuna.
        measurements: Single measurements of prompts, held-out ones included.
    """
    counts = [f"{evaluated} candidate{'s' * (evaluated != 1)} evaluated, {measured} measured in trials"]
    names = {"fail": "failed or interrupted", "waiting": "still queued", "running": "running"}
    counts += [f"{states[state]} {name}" for state, name in names.items() if states.get(state)]
    prompts = f"{measurements} measurement{'s' * (measurements != 1)} of a prompt, held-out ones included"
    return f"{'; '.join(counts)}; {prompts}"


def held_out_speedups(study: HasTrials, records: Sequence[MeasurementRecord]) -> dict[str, Speedup]:
    """Speedups of candidates on held-out prompts, over all measurements of any of their trials.

    Args:
        study: The study, or a snapshot of it.
        records: All measurements of the study.

    Returns:
        By :func:`studies.ranking.candidate_key`.
    """
    candidates = {trial.number: candidate_key(trial) for trial in predicted_trials(study)}
    held_out: dict[str, list[MeasurementRecord]] = {}
    for record in records:
        if record.prompt_set == "held-out" and record.trial in candidates:
            held_out.setdefault(candidates[record.trial], []).append(record)
    return {candidate: speedup_of_all(measurements) for candidate, measurements in held_out.items()}
