"""What a study's trials say: predictions, measured speedups, and the order that these put candidates in.

A trial's intermediate value at :data:`PREDICTION_STEP` is its predicted speedup, those at the steps after are the
measured speedups of single prompts. A trial is complete if it was measured on all prompts, and its value is then the
speedup of all of them together.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Literal, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from layerskip.drafting.config import DraftConfig

Basis = Literal["measured", "predicted"]
# The basis of a candidate's best speedup.
BestBasis = Literal["held-out", "measured", "predicted"]
PREDICTION_STEP = 0
# Attributes of trials. The one-step acceptance rate α;
ACCEPTANCE_KEY = "acceptance"
# cost c of a draft step in units of a plain step;
DRAFT_COST_KEY = "draft_cost"
# the draft configuration, with the policy that simulation chose, as JSON;
CONFIG_KEY = "config"
# the speedup of those prompts that were measured;
SPEEDUP_KEY = "speedup"
# the speedup that was predicted for these very prompts, which may be easier than all that predictions are for;
PREDICTED_HERE_KEY = "predicted_on_measured_prompts"
# whether it was traced on all texts, for one that cannot win is given up earlier;
FULLY_TRACED_KEY = "fully_traced"
# the warm start that proposed it, or another reason why it was enqueued;
SOURCE_KEY = "source"
# the number of the trial of the same candidate that was predicted earlier, of a trial that was enqueued to be measured.
REVISITS_KEY = "revisits"


class HasTrials(Protocol):
    """A study, or a :class:`Snapshot` of one."""

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """As Optuna's studies have it."""


class Snapshot:
    """A study's trials at one moment, read from its database once.

    Args:
        study: The study.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._trials = study.get_trials(deepcopy=False)

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """The trials in some states, or all; never copied."""
        return [trial for trial in self._trials if states is None or trial.state in states]


def config_of(trial: FrozenTrial) -> DraftConfig:
    """The draft configuration with which a trial's candidate was predicted and measured: its best policy included."""
    return DraftConfig.from_json(trial.user_attrs[CONFIG_KEY])


def prediction_of(trial: FrozenTrial) -> float:
    """The predicted speedup of a trial."""
    return trial.intermediate_values[PREDICTION_STEP]


def prediction_for_measured_prompts(trial: FrozenTrial) -> float:
    """The speedup that was predicted for the prompts that a trial measured; without any, its prediction."""
    predicted: float = trial.user_attrs.get(PREDICTED_HERE_KEY, prediction_of(trial))
    return predicted


def prompt_speedups(trial: FrozenTrial) -> Mapping[int, float]:
    """The measured speedups of single prompts, by the step at which they were reported."""
    return {step: value for step, value in trial.intermediate_values.items() if step != PREDICTION_STEP}


def predicted_trials(study: HasTrials) -> list[FrozenTrial]:
    """The finished trials that have a prediction."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [trial for trial in finished if PREDICTION_STEP in trial.intermediate_values]


def evaluated_trials(study: HasTrials) -> list[FrozenTrial]:
    """Those that count towards the number of trials asked for: not a second trial that measures a candidate."""
    return [trial for trial in predicted_trials(study) if REVISITS_KEY not in trial.user_attrs]


def completed_trials(study: HasTrials) -> list[FrozenTrial]:
    """The trials that were measured on all prompts."""
    return [trial for trial in predicted_trials(study) if trial.state == TrialState.COMPLETE]


def measured_trials(study: HasTrials) -> list[FrozenTrial]:
    """The trials that were measured, if only on some prompts."""
    return [trial for trial in predicted_trials(study) if basis_of(trial) == "measured"]


def is_stopped(trial: FrozenTrial) -> bool:
    """Whether a trial's measurement was stopped after some prompts, because it could not win."""
    return trial.state == TrialState.PRUNED and bool(prompt_speedups(trial))


def is_given_up(trial: FrozenTrial) -> bool:
    """Whether a candidate was given up, after the prediction for some texts or the measurement of some prompts."""
    return is_stopped(trial) or not trial.user_attrs.get(FULLY_TRACED_KEY, True)


def basis_of(trial: FrozenTrial) -> Basis:
    """Whether a trial's speedup was measured, if only on some prompts, or predicted."""
    return "measured" if trial.state == TrialState.COMPLETE or is_stopped(trial) else "predicted"


def speedup_of(trial: FrozenTrial) -> float:
    """A finished trial's speedup, measured or else predicted."""
    if trial.state == TrialState.COMPLETE:
        return float(trial.values[0])
    return float(trial.user_attrs[SPEEDUP_KEY]) if is_stopped(trial) else prediction_of(trial)


def candidate_key(trial: FrozenTrial) -> str:
    """A key that trials have in common exactly if their candidate is the same."""
    return json.dumps(trial.params, sort_keys=True)


def best_trials(study: HasTrials, count: int | None = None) -> list[FrozenTrial]:
    """The best candidates, best first, one trial for each; None gives all.

    Those measured on all prompts come first, by their speedups, then those only predicted. Those that were given up,
    after some texts or some prompts, come last: what they did on these says little.
    """
    best: dict[str, FrozenTrial] = {}
    for trial in predicted_trials(study):
        other = best.get(candidate_key(trial))
        if other is None or _certainty(trial) > _certainty(other):
            best[candidate_key(trial)] = trial
    return sorted(best.values(), key=_rank, reverse=True)[:count]


def _certainty(trial: FrozenTrial) -> tuple[bool, bool, float]:
    return trial.state == TrialState.COMPLETE, is_stopped(trial), speedup_of(trial)


def _rank(trial: FrozenTrial) -> tuple[bool, bool, float]:
    return trial.state == TrialState.COMPLETE, not is_given_up(trial), speedup_of(trial)
