"""Progress callbacks: events of a search and of training a draft, passed to one function as they happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from optuna.trial import FrozenTrial

from layerskip.drafting.config import DraftConfig
from layerskip.training import EvalResult, Trained
from studies.ranking import Basis, HasTrials, basis_of, best_trials, evaluated_trials, measured_trials, speedup_of


@dataclass(frozen=True)
class Progress:
    """How far a search is.

    Args:
        evaluated: Candidates predicted.
        measured: Candidates measured, if only on some prompts.
        best: The best speedup so far; None without any.
        basis: Whether it was measured or predicted.
    """

    evaluated: int
    measured: int
    best: float | None
    basis: Basis

    @classmethod
    def of(cls, study: HasTrials) -> Progress:
        """The progress of a search by its study."""
        best = best_trials(study, 1)
        return cls(
            evaluated=len(evaluated_trials(study)),
            measured=len(measured_trials(study)),
            best=speedup_of(best[0]) if best else None,
            basis=basis_of(best[0]) if best else "predicted",
        )


@dataclass(frozen=True)
class StudyOpened:
    """The study was created, or opened with what an earlier search did."""

    name: str
    progress: Progress


Phase = Literal["reference", "costs", "trials", "finalists", "baseline", "texts"]


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins.

    Args:
        phase: ``reference`` decodes the reference prompts, ``costs`` measures the parts of a step, ``texts`` lets the
            target model write texts to train on, ``baseline`` times transformers' plain decoding.
        total: Prompts of the reference, prompts that finalists decode, repeats included, or positions of the texts.
    """

    phase: Phase
    total: int = 0


@dataclass(frozen=True)
class ReferenceDecoded:
    """So many reference texts are there; one that is being decoded counts by the share of its tokens."""

    done: float


@dataclass(frozen=True)
class ReferenceReady:
    """All reference texts are there; so many were found in the cache."""

    found: int


@dataclass(frozen=True)
class TextsWritten:
    """The texts to train on have so many positions by now."""

    positions: int


@dataclass(frozen=True)
class TrainingStarted:
    """A draft that scores so many tokens will be trained on so many positions."""

    positions: int
    vocabulary: int


@dataclass(frozen=True)
class Evaluated:
    """A draft in training was evaluated on held-out texts; its ideal speedup needs verification to cost one step."""

    result: EvalResult
    ideal: float


@dataclass(frozen=True)
class TrainingEnded:
    """Training reached its end, or gained no more on held-out texts, or was interrupted."""

    trained: Trained


@dataclass(frozen=True)
class PolicyChosen:
    """Simulation chose the policy of a trained draft."""

    config: DraftConfig
    predicted: float


@dataclass(frozen=True)
class PromptMeasured:
    """A draft has decoded so many prompts; 0 before the first.

    Args:
        done: Prompts decoded.
        total: Prompts that it decodes unless it is stopped early.
        trial: Number of the trial that it comes from; None for a trained draft.
    """

    done: int
    total: int
    trial: int | None = None


@dataclass(frozen=True)
class TrialFinished:
    """A trial ended."""

    trial: FrozenTrial
    progress: Progress


@dataclass(frozen=True)
class HeldOutPromptMeasured:
    """All finalists have decoded so many held-out prompts, repeats included."""

    done: int


@dataclass(frozen=True)
class FinalistMeasured:
    """A finalist was measured on held-out prompts."""

    trial: FrozenTrial
    speedup: float


Event = (
    StudyOpened
    | PhaseStarted
    | ReferenceDecoded
    | ReferenceReady
    | TextsWritten
    | TrainingStarted
    | Evaluated
    | TrainingEnded
    | PolicyChosen
    | PromptMeasured
    | TrialFinished
    | HeldOutPromptMeasured
    | FinalistMeasured
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing about an event."""
