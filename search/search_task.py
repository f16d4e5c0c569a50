"""What a search has to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerskip.errors import InvalidInputError
from layerskip.fingerprint import ModelIdentity
from search.prompts import PromptSplit
from search.settings import SearchSettings
from search.space import SearchSpace


@dataclass(frozen=True)
class SearchTask:
    """What a search has to do; it can be sent to another process.

    Args:
        identity: The model's identity.
        prompts: The prompts to search with, and those held out.
        settings: How long and how thoroughly to search.
        space: The search space.
        study: The study's name; None makes one of the model's id and of all that values depend on, so that the same
            search finds its study again and another search gets another one.
        folder: Where reference texts and locks are kept; None is :func:`layerskip.checkpoints.cache_folder`.
        ends: Time on the machine's monotonic clock from which on no trial starts; None leaves it to the settings.
        worker: Number of the process, where several work on one study; 0 is the first, which plans what is tried.

    Raises:
        InvalidInputError: The study's name is empty.
    """

    identity: ModelIdentity
    prompts: PromptSplit
    settings: SearchSettings
    space: SearchSpace
    study: str | None = None
    folder: Path | None = None
    ends: float | None = None
    worker: int = 0

    def __post_init__(self) -> None:
        if self.study is not None and not self.study.strip():
            raise InvalidInputError("study: the name is empty; leave --study out for a name made of the search itself")
