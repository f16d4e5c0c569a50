"""What a search found."""

from __future__ import annotations

from dataclasses import dataclass

from layerskip.profile import DraftProfile
from search.baseline import TransformersBaseline
from search.break_even import Shortfall
from search.finalists import AtFullPrecision


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        study: The study's name.
        trials: Candidates that were evaluated.
        measured: Candidates that were measured, if only on some prompts.
        profile: The best candidate's profile; None if none was measured.
        interrupted: Whether Ctrl-C ended the search early.
        full_precision: The best candidate at full precision, where the search tried others too and it was measured on
            held-out prompts.
        transformers: transformers' plain decoding, where it was timed.
        shortfall: Why the best candidate does not pay; None where it does, or Ctrl-C ended the search.
    """

    study: str
    trials: int
    measured: int
    profile: DraftProfile | None
    interrupted: bool
    full_precision: AtFullPrecision | None = None
    transformers: TransformersBaseline | None = None
    shortfall: Shortfall | None = None
