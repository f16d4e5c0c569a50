"""What every searcher is given, and what it tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip import LayerSkipModel, generate
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.factory import make_drafter
from layerskip.engine import Engine
from layerskip.utils import device_seconds
from search.prompts import EncodedPrompt, SearchPrompts


@dataclass(frozen=True)
class Task:
    """What is searched, and until when.

    Args:
        engine: Runs the passes of the model.
        fingerprint: Of its weights.
        prompts: Who may decode what; held-out prompts are for the judge alone.
        max_new_tokens: Tokens for each of the judge's prompts.
        seconds: How long to search, preparation included.
        seed: Of everything that is drawn.
    """

    engine: Engine
    fingerprint: str
    prompts: SearchPrompts
    max_new_tokens: int
    seconds: float
    seed: int

    @property
    def model(self) -> LayerSkipModel:
        """The model."""
        return self.engine.model


@dataclass(frozen=True)
class Incumbent:
    """The best draft that a searcher had found at some time.

    Args:
        seconds: Since it began.
        config: How the draft drafts.
    """

    seconds: float
    config: DraftConfig

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"seconds": self.seconds, "config": self.config.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Incumbent:
        """The inverse of :meth:`as_json`."""
        return cls(values["seconds"], DraftConfig.from_json(values["config"]))


Searcher = Callable[[Task], Iterator[Incumbent]]


class Stopwatch:
    """Seconds since it was made, and whether a task's are over."""

    def __init__(self, task: Task) -> None:
        self._began = time.perf_counter()
        self._limit = task.seconds

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._began

    @property
    def over(self) -> bool:
        """Whether time is up."""
        return self.seconds >= self._limit


def decode_seconds_per_token(
    task: Task, config: DraftConfig, prompts: Sequence[EncodedPrompt], max_new_tokens: int
) -> float:
    """What published searchers score by: decoding some prompts self-speculatively."""
    drafter = make_drafter(task.model, config)
    tokens = 0
    started = device_seconds(task.model.device)
    for prompt in prompts:
        generation = generate(
            task.model, prompt.tokens, engine=task.engine, drafter=drafter, max_new_tokens=max_new_tokens
        )
        tokens += len(generation.tokens)
    return (device_seconds(task.model.device) - started) / tokens
