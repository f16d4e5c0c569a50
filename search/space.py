"""What a search may choose: one bit for each sublayer, and when a draft ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna

from layerskip.decoding.draft_exit import AdaptiveThreshold, ConfidenceThreshold, DraftExit, FixedLength
from layerskip.stack.skipset import SkipSet


@dataclass(frozen=True)
class Candidate:
    """What one trial tries: a skip set and a draft exit."""

    skip_set: SkipSet
    draft_exit: DraftExit

    def __str__(self) -> str:
        return f"{self.skip_set} · draft {self.draft_exit}"


@dataclass(frozen=True)
class SearchSpace:
    """The choices of a search.

    Args:
        num_layers: Decoder layers of the model; twice as many bits are searched.
        max_draft_length: Longest draft to try.
        lowest_threshold: Lowest confidence threshold to try.
        highest_threshold: Highest confidence threshold to try.
    """

    num_layers: int
    max_draft_length: int = 8
    lowest_threshold: float = 0.1
    highest_threshold: float = 0.95

    def describe(self) -> dict[str, Any]:
        """The space as plain values, to tell one from another."""
        return asdict(self)

    def suggest(self, trial: optuna.trial.BaseTrial) -> Candidate:
        """Let a trial choose.

        Raises:
            InvalidInputError: The trial chose to skip every sublayer.
        """
        mask = [trial.suggest_categorical(name, (0, 1)) for name in self._bit_names()]
        return Candidate(SkipSet.from_mask(mask), self._suggest_exit(trial))

    def _suggest_exit(self, trial: optuna.trial.BaseTrial) -> DraftExit:
        kind = trial.suggest_categorical("exit", ("fixed", "confidence", "adaptive"))
        length = trial.suggest_int("draft_length", 1, self.max_draft_length)
        if kind == "fixed":
            return FixedLength(length)
        threshold = trial.suggest_float("threshold", self.lowest_threshold, self.highest_threshold)
        if kind == "confidence":
            return ConfidenceThreshold(threshold, length)
        return AdaptiveThreshold(threshold, length)

    def parameters(self, candidate: Candidate) -> dict[str, int | float | str]:
        """A candidate as the parameters of a trial; the inverse of :meth:`candidate`."""
        chosen: dict[str, int | float | str] = {
            name: int(skip) for name, skip in zip(self._bit_names(), candidate.skip_set.mask, strict=True)
        }
        match candidate.draft_exit:
            case FixedLength(length):
                return chosen | {"exit": "fixed", "draft_length": length}
            case ConfidenceThreshold(threshold, length):
                return chosen | {"exit": "confidence", "draft_length": length, "threshold": threshold}
            case AdaptiveThreshold(threshold, length):
                return chosen | {"exit": "adaptive", "draft_length": length, "threshold": threshold}

    def candidate(self, parameters: Mapping[str, Any]) -> Candidate:
        """What a finished trial with these parameters tried."""
        return self.suggest(optuna.trial.FixedTrial(dict(parameters)))

    def _bit_names(self) -> list[str]:
        """One parameter for each sublayer, in stack order."""
        width = len(str(self.num_layers - 1))
        return [f"skip_{kind}_{layer:0{width}}" for layer in range(self.num_layers) for kind in ("attn", "mlp")]
