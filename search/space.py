"""What a search may choose: one bit for each sublayer, and what stands in for what is left out.

When a draft ends is not searched by trials: replay finds the best policy for each candidate with no model run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from pydantic import TypeAdapter

from layerskip.drafting.config import DraftConfig, PromptLookup
from layerskip.drafting.stopping import AdaptiveThreshold, ConfidenceThreshold, DraftStopping, FixedLength
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from layerskip.token_tree import describe_branches
from search.draft_layers import DraftLayerRef

_VOCABULARIES = (8192, 16384, 24576)
_GATES = (0.3, 0.6)
_CONFIDENCE_LENGTHS = (2, 4, 8)
_CONFIDENCES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
# With the token behind which is drafted, these make passes of widths that are cheap on many machines.
_TREES = (3, 7, 15, 23)
_ADAPTIVE_LENGTHS = (4, 8)
_ADAPTIVE_STARTS = (0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Candidate:
    """What one trial tries.

    Args:
        skip_set: What the draft leaves out; with a stand-in, all that this stands for, whether it is named or not.
        bridged: Whether bridges stand in for runs of skipped sublayers that are worth one.
        vocabulary: Size of the draft vocabulary; 0 is the whole one. Where it is the size of the stand-in's own, it is
            that one.
        stand_in: A trained one, which runs in place of everything above an early exit.

    Raises:
        InvalidInputError: Nothing would be left below the stand-in, or it is for another number of layers.
    """

    skip_set: SkipSet
    bridged: bool = False
    vocabulary: int = 0
    stand_in: DraftLayerRef | None = None

    def __post_init__(self) -> None:
        if self.stand_in is not None:
            object.__setattr__(self, "skip_set", self.stand_in.with_run(self.skip_set))

    @property
    def skipped_below(self) -> SkipSet:
        """What is left out and has no trained stand-in."""
        return self.skip_set if self.stand_in is None else self.stand_in.without_run(self.skip_set)

    @property
    def extras(self) -> list[str]:
        """Everything but the skip set, for people."""
        trained = [] if self.stand_in is None else [str(self.stand_in)]
        return trained + ["bridged"] * self.bridged + [f"vocabulary {self.vocabulary}"] * bool(self.vocabulary)

    def __str__(self) -> str:
        return " · ".join([str(self.skip_set), *self.extras])


@dataclass(frozen=True)
class Policy:
    """When to draft.

    Args:
        draft_exit: When a draft ends.
        gate: Confidence of the target model below which the next round drafts nothing.
        branches: How many tokens are proposed for the first place of a draft, for the second, and so on; as in
            :class:`layerskip.drafting.head_drafter.HeadDrafter`.
        ngrams: What to copy from the text before the model is asked to draft; None copies nothing.
    """

    draft_exit: DraftStopping
    gate: float = 0.0
    branches: tuple[int | tuple[int, ...], ...] = ()
    ngrams: PromptLookup | None = None

    def __str__(self) -> str:
        return (
            str(self.draft_exit)
            + f", branches {describe_branches(self.branches)}" * bool(self.branches)
            + f", {self.ngrams}" * bool(self.ngrams)
            + f", gate {self.gate:g}" * bool(self.gate)
        )

    def config(self, skip_set: SkipSet) -> DraftConfig:
        """How to draft with a skip set by this policy."""
        return DraftConfig(
            skip_set,
            stopping=self.draft_exit,
            target_confidence_threshold=self.gate,
            tree=self.branches,
            prompt_lookup=self.ngrams,
        )

    def as_json(self) -> str:
        """The policy as text, to be kept with a trial."""
        return _POLICY.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The inverse of :meth:`as_json`."""
        return _POLICY.validate_json(text)


_POLICY = TypeAdapter(Policy)


@dataclass(frozen=True)
class SearchSpace:
    """The choices of a search.

    Args:
        num_layers: Decoder layers of the model; twice as many bits are searched.
        max_draft_length: Longest draft to try.
        bridges: Whether to try bridges.
        vocabularies: Sizes of the draft vocabulary to try; 0 is the whole one.
        gates: Target-confidence gates to try; 0 is none.
        trees: Sizes of drafts that branch to try, in tokens; none are chains alone.
        ngrams: Whether to try to copy from the text first.
        stand_ins: Trained ones to try.
    """

    num_layers: int
    max_draft_length: int = 8
    bridges: bool = False
    vocabularies: tuple[int, ...] = (0,)
    gates: tuple[float, ...] = (0.0,)
    trees: tuple[int, ...] = ()
    ngrams: bool = False
    stand_ins: tuple[DraftLayerRef, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabularies", tuple(self.vocabularies))  # lists, where they come from JSON
        object.__setattr__(self, "gates", tuple(self.gates))
        object.__setattr__(self, "trees", tuple(self.trees))
        object.__setattr__(self, "stand_ins", tuple(map(_stand_in, self.stand_ins)))

    @classmethod
    def of(
        cls,
        model: LayerSkipModel,
        *,
        bridges: bool = True,
        vocabulary: bool = True,
        gate: bool = True,
        branches: bool = True,
        ngrams: bool = True,
        stand_ins: Sequence[DraftLayerRef] = (),
    ) -> SearchSpace:
        """The space for a model, with all that drafts can have or with a part of it.

        With draft vocabularies, those that the stand-ins were trained with are among the sizes to try.
        """
        wanted = {*_VOCABULARIES, *(one.vocabulary for one in stand_ins if one.vocabulary)}
        sizes = (size for size in sorted(wanted) if size < model.vocab_size)
        return cls(
            model.num_layers,
            bridges=bridges,
            vocabularies=(0, *sizes) if vocabulary else (0,),
            gates=(0.0, *_GATES) if gate else (0.0,),
            trees=_TREES if branches else (),
            ngrams=ngrams,
            stand_ins=tuple(stand_ins),
        )

    def describe(self) -> dict[str, Any]:
        """The space as plain values, to tell one from another."""
        lists = ("vocabularies", "gates", "trees", "stand_ins")
        described = asdict(self)
        described |= {name: list(described[name]) for name in lists}
        if not self.stand_ins:  # studies of earlier versions have none, and go on
            del described["stand_ins"]
        return described

    @property
    def most_drafted(self) -> int:
        """Tokens in the largest draft of any policy."""
        return max((self.max_draft_length, *self.trees))

    def policies(self) -> list[Policy]:
        """Every policy without branches that replay tries."""
        longest = self.max_draft_length
        exits: list[DraftStopping] = [FixedLength(length) for length in range(1, longest + 1)]
        for length in sorted({min(length, longest) for length in _CONFIDENCE_LENGTHS}):
            exits += [ConfidenceThreshold(threshold, length) for threshold in _CONFIDENCES]
        for length in sorted({min(length, longest) for length in _ADAPTIVE_LENGTHS}):
            exits += [AdaptiveThreshold(threshold, length) for threshold in _ADAPTIVE_STARTS]
        return [Policy(draft_exit, gate) for gate in self.gates for draft_exit in exits]

    def suggest(self, trial: optuna.trial.BaseTrial) -> Candidate:
        """Let a trial choose.

        Raises:
            InvalidInputError: The trial chose to skip every sublayer.
        """
        # Before the bits: a sampler may know by it which of them matter.
        number = trial.suggest_categorical("stand_in", tuple(range(len(self.stand_ins) + 1))) if self.stand_ins else 0
        mask = [trial.suggest_categorical(name, (0, 1)) for name in self.bit_names()]
        sizes = self.vocabularies
        # All before the mask is looked at: samplers forget parameters that some trial lacks.
        bridged = trial.suggest_categorical("bridged", (False, True)) if self.bridges else False
        vocabulary = sizes[0] if len(sizes) == 1 else trial.suggest_categorical("vocabulary", sizes)
        stand_in = self.stand_ins[number - 1] if number else None
        if stand_in is not None:
            mask = [bit if index < stand_in.start else 1 for index, bit in enumerate(mask)]
        return Candidate(SkipSet.from_mask(mask), bridged, vocabulary, stand_in)

    def parameters(self, candidate: Candidate) -> dict[str, int | float | str]:
        """A candidate as the parameters of a trial; the inverse of :meth:`candidate`."""
        chosen: dict[str, int | float | str] = {
            name: int(skip) for name, skip in zip(self.bit_names(), candidate.skip_set.mask, strict=True)
        }
        if self.bridges:
            chosen["bridged"] = candidate.bridged
        if len(self.vocabularies) > 1:
            chosen["vocabulary"] = candidate.vocabulary
        if self.stand_ins:
            chosen["stand_in"] = 0 if candidate.stand_in is None else self.stand_ins.index(candidate.stand_in) + 1
        return chosen

    def candidate(self, parameters: Mapping[str, Any]) -> Candidate:
        """What a finished trial with these parameters tried."""
        return self.suggest(optuna.trial.FixedTrial(dict(parameters)))

    def bit_names(self) -> list[str]:
        """One parameter for each sublayer, in stack order."""
        width = len(str(self.num_layers - 1))
        return [f"skip_{kind}_{layer:0{width}}" for layer in range(self.num_layers) for kind in ("attn", "mlp")]


def _stand_in(value: DraftLayerRef | Mapping[str, Any]) -> DraftLayerRef:
    """Itself, or what it was described as."""
    return value if isinstance(value, DraftLayerRef) else DraftLayerRef(**value)
