"""What a search comes to: the best candidate as a draft profile."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from optuna.trial import FrozenTrial

from layerskip.drafts.assets import DraftAssets
from layerskip.identity import ModelIdentity
from layerskip.machine import library_versions
from layerskip.profile import DraftProfile, Measured, PromptSet, Provenance
from search.measure import Summary
from search.space import Candidate
from search.trials import policy_of
from studies.study import StudyContext


@dataclass(frozen=True)
class Finalist:
    """A candidate whose speed was measured.

    Args:
        trial: The trial that it comes from.
        summary: What was measured.
        prompt_set: On what.
    """

    trial: FrozenTrial
    summary: Summary
    prompt_set: PromptSet

    @classmethod
    def of(cls, trial: FrozenTrial) -> Finalist:
        """A measured trial with the figures that the search itself measured."""
        figures = {name: trial.user_attrs[name] for name in Summary.__dataclass_fields__}
        return cls(trial, Summary(**figures), "search")


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Args:
        study: The study's name.
        trials: Candidates that were looked at.
        measured: Candidates that were decoded for real.
        profile: The best candidate's profile; None if none was measured.
        interrupted: Whether Ctrl-C ended the search early.
    """

    study: str
    trials: int
    measured: int
    profile: DraftProfile | None
    interrupted: bool


def measured_part(summary: Summary, prompt_set: PromptSet, *, max_new_tokens: int, device: str, dtype: str) -> Measured:
    """Measurements as a profile tells them.

    Args:
        summary: What was measured.
        prompt_set: On what.
        max_new_tokens: Most tokens generated for each prompt.
        device: Name of the device.
        dtype: Name of the model's floating-point type.
    """
    figures = asdict(summary)
    figures["speculative_tokens_per_second"] = figures.pop("draft_tokens_per_second")
    return Measured(
        **figures,
        prompt_set=prompt_set,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        versions=library_versions(),
    )


def profile_of(
    best: Finalist,
    candidate: Candidate,
    assets: DraftAssets,
    identity: ModelIdentity,
    study: str,
    context: StudyContext,
    *,
    training_seconds: float | None = None,
) -> DraftProfile:
    """The profile of a measured candidate.

    Args:
        best: What was measured.
        candidate: What its trial tried.
        assets: Its stand-ins and vocabulary.
        identity: The model.
        study: The study's name.
        context: What the study's values depend on.
        training_seconds: How long its stand-in was trained, if it has one and that is known.
    """
    policy = policy_of(best.trial)
    profile = DraftProfile(
        model=identity,
        skip_set=candidate.skip_set,
        draft_exit=policy.draft_exit,
        gate=policy.gate,
        branches=policy.branches,
        ngrams=policy.ngrams,
        measured=measured_part(
            best.summary,
            best.prompt_set,
            max_new_tokens=context.max_new_tokens,
            device=context.device,
            dtype=context.dtype,
        ),
        provenance=Provenance(
            study=study,
            trial=best.trial.number,
            created=datetime.now(UTC),
            tool=f"layerskip {library_versions()['layerskip']}",
            training_seconds=training_seconds,
        ),
    )
    return profile.with_assets(assets)
