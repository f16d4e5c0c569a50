"""Being told how a search goes."""

from __future__ import annotations

from dataclasses import dataclass

from optuna.trial import FrozenTrial

from studies.ranking import Basis


@dataclass(frozen=True)
class Progress:
    """Where a search stands.

    Args:
        seen: Candidates looked at.
        measured: Candidates decoded for real.
        best: The best speedup so far; None if nothing has a value.
        basis: Whether it was measured or predicted.
    """

    seen: int
    measured: int
    best: float | None
    basis: Basis


class SearchObserver:
    """Told how a search goes. Does nothing; override what you want to know."""

    def study_opened(self, name: str, progress: Progress) -> None:
        """The study is open, and so far has come an earlier search."""

    def reference_begins(self, prompts: int) -> None:
        """So many prompts are needed as the target model continues them, to hold drafts against."""

    def reference_ready(self, found: int) -> None:
        """They are there; ``found`` of them had been decoded in an earlier search."""

    def costs_begin(self) -> None:
        """What the parts of a step cost will be measured."""

    def trials_begin(self) -> None:
        """All is prepared."""

    def measurement_begins(self, trial: int) -> None:
        """A candidate, or a finalist, will be decoded for real."""

    def prompt_measured(self, number: int, total: int) -> None:
        """It has decoded ``number`` of ``total`` prompts."""

    def trial_finished(self, progress: Progress, trial: FrozenTrial) -> None:
        """A trial ended."""

    def finalists_chosen(self, count: int) -> None:
        """The search is over, and so many candidates will be measured on held-out prompts."""

    def finalist_measured(self, number: int, trial: FrozenTrial, speedup: float) -> None:
        """A finalist, the ``number``-th, was measured."""
