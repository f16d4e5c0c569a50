"""What a search may choose: one bit for each sublayer, and when a draft ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import optuna

from layerskip.decoding.draft_exit import AdaptiveThreshold, ConfidenceThreshold, DraftExit, FixedLength
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet

_VOCABULARIES = (8192, 16384, 24576)
_GATES = (0.3, 0.6)


@dataclass(frozen=True)
class Candidate:
    """What one trial tries.

    Args:
        skip_set: What the draft leaves out.
        draft_exit: When a draft ends.
        bridged: Whether bridges stand in for runs of skipped sublayers that are worth one.
        vocabulary: Size of the draft vocabulary; 0 is the whole one.
        gate: Confidence of the full model below which the next round drafts nothing.
    """

    skip_set: SkipSet
    draft_exit: DraftExit
    bridged: bool = False
    vocabulary: int = 0
    gate: float = 0.0

    @property
    def draft(self) -> str:
        """Everything but the skip set, for people."""
        extras = [str(self.draft_exit)]
        extras += ["bridged"] * self.bridged
        extras += [f"vocabulary {self.vocabulary}"] * bool(self.vocabulary)
        extras += [f"gate {self.gate:g}"] * bool(self.gate)
        return ", ".join(extras)

    def __str__(self) -> str:
        return f"{self.skip_set} · draft {self.draft}"


@dataclass(frozen=True)
class SearchSpace:
    """The choices of a search.

    Args:
        num_layers: Decoder layers of the model; twice as many bits are searched.
        max_draft_length: Longest draft to try.
        lowest_threshold: Lowest confidence threshold to try.
        highest_threshold: Highest confidence threshold to try.
        bridges: Whether to try bridges.
        vocabularies: Sizes of the draft vocabulary to try; 0 is the whole one.
        gates: Target-confidence gates to try; 0 is none.
    """

    num_layers: int
    max_draft_length: int = 8
    lowest_threshold: float = 0.1
    highest_threshold: float = 0.95
    bridges: bool = False
    vocabularies: tuple[int, ...] = (0,)
    gates: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabularies", tuple(self.vocabularies))  # lists, where they come from JSON
        object.__setattr__(self, "gates", tuple(self.gates))

    @classmethod
    def of(
        cls, model: LayerSkipModel, *, bridges: bool = True, vocabulary: bool = True, gate: bool = True
    ) -> SearchSpace:
        """The space for a model, with all that drafts can have or with a part of it."""
        sizes = (size for size in _VOCABULARIES if size < model.vocab_size)
        return cls(
            model.num_layers,
            bridges=bridges,
            vocabularies=(0, *sizes) if vocabulary else (0,),
            gates=(0.0, *_GATES) if gate else (0.0,),
        )

    @property
    def needs_reference(self) -> bool:
        """Whether candidates may have bridges or a draft vocabulary, which are made from a reference run."""
        return self.bridges or any(self.vocabularies)

    def describe(self) -> dict[str, Any]:
        """The space as plain values, to tell one from another."""
        return asdict(self) | {"vocabularies": list(self.vocabularies), "gates": list(self.gates)}

    def suggest(self, trial: optuna.trial.BaseTrial) -> Candidate:
        """Let a trial choose.

        Raises:
            InvalidInputError: The trial chose to skip every sublayer.
        """
        mask = [trial.suggest_categorical(name, (0, 1)) for name in self._bit_names()]
        return Candidate(
            SkipSet.from_mask(mask),
            self._suggest_exit(trial),
            bridged=trial.suggest_categorical("bridged", (False, True)) if self.bridges else False,
            vocabulary=_suggest_among(trial, "vocabulary", self.vocabularies),
            gate=_suggest_among(trial, "gate", self.gates),
        )

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
        if self.bridges:
            chosen["bridged"] = candidate.bridged
        if len(self.vocabularies) > 1:
            chosen["vocabulary"] = candidate.vocabulary
        if len(self.gates) > 1:
            chosen["gate"] = candidate.gate
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


_Choice = TypeVar("_Choice", int, float)


def _suggest_among(trial: optuna.trial.BaseTrial, name: str, choices: tuple[_Choice, ...]) -> _Choice:
    """A trial's choice; without alternatives, no parameter."""
    return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)
