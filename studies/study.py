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
from studies.records import count_measurements

_CONTEXT_KEY = "layerskip"
_FORMAT = 1
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


def open_study(storage: optuna.storages.BaseStorage, name: str, context: StudyContext) -> optuna.Study:
    """Create a study that maximizes, or go on with the one of that name.

    Raises:
        InvalidInputError: A study of that name exists, and was made in another context or by something else.
    """
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    recorded = study.user_attrs.get(_CONTEXT_KEY)
    if recorded is None and not study.get_trials(deepcopy=False) and _maximizes(study):
        study.set_user_attr(_CONTEXT_KEY, {"format": _FORMAT, **asdict(context)})
        return study
    if recorded is None:  # another worker may have made it in between
        recorded = study.user_attrs.get(_CONTEXT_KEY, {})
    if _is_newer(recorded):
        raise InvalidInputError(f"study '{name}': {_NEWER}, or choose another name with --study")
    if recorded.get("format") != _FORMAT:
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


@dataclass(frozen=True)
class StudySummary:
    """A study at a glance."""

    name: str
    model: str | None
    trials: int
    completed: int
    best_speedup: float | None


def list_studies(storage: optuna.storages.BaseStorage) -> list[StudySummary]:
    """All studies of a storage, by name."""
    return sorted((_summary(study) for study in _studies(storage)), key=lambda summary: summary.name)


def _studies(storage: optuna.storages.BaseStorage) -> list[optuna.Study]:
    return [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage=storage)]


def _summary(study: optuna.Study) -> StudySummary:
    best = best_trials(study, 1) if _maximizes(study) else []
    return StudySummary(
        name=study.study_name,
        model=study.user_attrs.get(_CONTEXT_KEY, {}).get("model"),
        trials=sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)),
        completed=len(completed_trials(study)),
        best_speedup=best[0].value if best else None,
    )


def load_study(storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
    """An existing study.

    Raises:
        InvalidInputError: There is none of that name; the message lists those that are.
    """
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError as error:
        names = ", ".join(sorted(optuna.get_all_study_names(storage=storage))) or "none"
        raise InvalidInputError(f"study '{name}': no such study in this storage; studies there: {names}") from error


def describe_study(storage: optuna.storages.BaseStorage, name: str, best: int) -> dict[str, Any]:
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
    return {
        "study": name,
        "context": context,
        "trials": dict(Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))),
        "measurements": count_measurements(storage, name),
        "best": [
            {"number": trial.number, "speedup": trial.values[0]}
            | {key: trial.user_attrs.get(key) for key in ("acceptance_rate", "skip_set", "draft_exit")}
            for trial in (best_trials(study, best) if _maximizes(study) else [])
        ],
    }


def completed_trials(study: optuna.Study) -> Sequence[FrozenTrial]:
    """The trials that have a value."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_trials(study: optuna.Study, count: int) -> list[FrozenTrial]:
    """The completed trials with the highest values, best first, each candidate once."""
    ranked = sorted(completed_trials(study), key=lambda trial: trial.values[0], reverse=True)
    different = {json.dumps(trial.params, sort_keys=True): trial for trial in reversed(ranked)}
    return sorted(different.values(), key=lambda trial: trial.values[0], reverse=True)[:count]
