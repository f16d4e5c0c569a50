"""Search space: the draft configurations that a study may try, as parameters of Optuna's trials.

A trial chooses a *candidate*: skip set, precision, bridges, draft layer and draft vocabulary. When and how much it
drafts, its *policy*, is not searched by trials: simulation finds the best policy without running the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from layerskip.drafting.config import DraftConfig, DraftLayerRef, PromptLookup
from layerskip.drafting.stopping import AdaptiveThreshold, ConfidenceThreshold, DraftStopping, FixedLength
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.names import Precision
from layerskip.skip_set import SkipSet

DRAFT_LAYER = "draft_layer"
_VOCABULARY_SIZES = (8192, 16384, 24576)
_TARGET_CONFIDENCES = (0.3, 0.6)
_CONFIDENCE_LENGTHS = (2, 4, 8)
CONFIDENCES = (0.2, 0.4, 0.6, 0.8)
# With the token after which is drafted, these make passes of widths that are cheap on many machines.
_TREE_SIZES = (3, 7, 15, 23)
_ADAPTIVE_LENGTHS = (4, 8)
_ADAPTIVE_STARTS = (0.4, 0.6, 0.8)
# Of prompt lookup. As trees, the lengths make passes of widths that are cheap on many machines.
_SHORTEST_MATCHES = (1, 2, 3)
_LOOKUP_LENGTHS = (7, 15, 23)
_TOKENS_PER_MATCH = (2, 4)
_LISTS = ("precisions", "vocabulary_sizes", "target_confidence_thresholds", "tree_sizes", "draft_layers")


@dataclass(frozen=True)
class SearchSpace:
    """The draft configurations that a search chooses among.

    Args:
        num_layers: Decoder layers of the model; a trial has one bit for each of its ``2 * num_layers`` sublayers.
        max_draft_length: Longest draft to try.
        precisions: Precisions to try, of the sublayers that a draft keeps and of its head.
        bridges: Whether to try bridges.
        vocabulary_sizes: Sizes of the draft vocabulary to try; 0 is the whole one.
        target_confidence_thresholds: Target-confidence thresholds to try; 0 is none.
        tree_sizes: Sizes of token trees to try, in tokens; without any, drafts are chains.
        prompt_lookup: Whether to try prompt lookup before the model drafts.
        draft_layers: Trained draft layers to try.
    """

    num_layers: int
    max_draft_length: int = 8
    precisions: tuple[Precision, ...] = ("full",)
    bridges: bool = False
    vocabulary_sizes: tuple[int, ...] = (0,)
    target_confidence_thresholds: tuple[float, ...] = (0.0,)
    tree_sizes: tuple[int, ...] = ()
    prompt_lookup: bool = False
    draft_layers: tuple[DraftLayerRef, ...] = ()

    def __post_init__(self) -> None:
        for name in _LISTS:  # lists of plain values, where they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        layers = (layer if isinstance(layer, DraftLayerRef) else DraftLayerRef(**layer) for layer in self.draft_layers)
        object.__setattr__(self, "draft_layers", tuple(layers))

    @classmethod
    def of(
        cls,
        model: LayerSkipModel,
        *,
        precisions: Sequence[Precision] | None = None,
        bridges: bool = True,
        vocabularies: bool = True,
        target_confidence: bool = True,
        trees: bool = True,
        prompt_lookup: bool = True,
        draft_layers: Sequence[DraftLayerRef] = (),
    ) -> SearchSpace:
        """The space for a model, with every drafting option or without some.

        Without precisions of its own, it has all that the model can draft at here. With draft vocabularies, those that
        the draft layers were trained with are among the sizes to try.
        """
        wanted = {*_VOCABULARY_SIZES, *(layer.vocabulary_size for layer in draft_layers)} - {0}
        sizes = (size for size in sorted(wanted) if size < model.vocab_size)
        return cls(
            model.num_layers,
            precisions=model.copies.precisions if precisions is None else tuple(precisions),
            bridges=bridges,
            vocabulary_sizes=(0, *sizes) if vocabularies else (0,),
            target_confidence_thresholds=(0.0, *_TARGET_CONFIDENCES) if target_confidence else (0.0,),
            tree_sizes=_TREE_SIZES if trees else (),
            prompt_lookup=prompt_lookup,
            draft_layers=tuple(draft_layers),
        )

    def describe(self) -> dict[str, Any]:
        """The space as plain values of JSON."""
        described = asdict(self)
        return described | {name: list(described[name]) for name in _LISTS}

    @property
    def most_drafted(self) -> int:
        """Tokens in the largest draft of any policy."""
        return max((self.max_draft_length, *self.tree_sizes, *(lookup.length for lookup in self.prompt_lookups)))

    @property
    def prompt_lookups(self) -> list[PromptLookup]:
        """Settings of prompt lookup to try."""
        choices = itertools.product(_SHORTEST_MATCHES, _LOOKUP_LENGTHS, _TOKENS_PER_MATCH) if self.prompt_lookup else ()
        return [PromptLookup(*settings) for settings in choices]

    @property
    def choices(self) -> Mapping[str, tuple[Any, ...]]:
        """The values to try of each field of a configuration but the skip set and the draft layer."""
        return {
            "bridges": (False, True) if self.bridges else (False,),
            "vocabulary_size": self.vocabulary_sizes,
            "precision": self.precisions,
        }

    @cached_property
    def options(self) -> list[DraftConfig]:
        """Every choice besides the skip set, as configurations that skip only what their draft layer replaces."""
        nothing, choices = SkipSet(self.num_layers), self.choices
        return [
            DraftConfig(nothing, draft_layer=layer, **dict(zip(choices, values, strict=True)))
            for values in itertools.product(*choices.values())
            for layer in (None, *self.draft_layers)
        ]

    @cached_property
    def bit_names(self) -> tuple[str, ...]:
        """Names of the parameters that say whether a sublayer is skipped, in stack order."""
        width = len(str(self.num_layers - 1))
        return tuple(f"skip_{kind}_{layer:0{width}}" for layer in range(self.num_layers) for kind in ("attn", "mlp"))

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The parameters of a trial, as Optuna describes them.

        The draft layer comes first: samplers know by it which bits matter.
        """
        described: dict[str, BaseDistribution] = {}
        if self.draft_layers:
            described[DRAFT_LAYER] = CategoricalDistribution(tuple(range(len(self.draft_layers) + 1)))
        described |= {name: CategoricalDistribution((0, 1)) for name in self.bit_names}
        described |= {name: CategoricalDistribution(values) for name, values in self.choices.items() if len(values) > 1}
        return described

    def suggest(self, trial: optuna.trial.BaseTrial) -> DraftConfig:
        """Let a trial choose a candidate.

        Raises:
            InvalidInputError: The trial chose to skip every sublayer.
        """
        # All of them before any is looked at: samplers forget parameters that some trial lacks.
        distributions = self.distributions.items()
        return self.config({name: trial.suggest_categorical(name, d.choices) for name, d in distributions})  # type: ignore[attr-defined]

    def config(self, parameters: Mapping[str, Any]) -> DraftConfig:
        """The candidate that a trial with these parameters tried.

        Raises:
            InvalidInputError: The parameters skip every sublayer.
        """
        layer = self.draft_layer(parameters.get(DRAFT_LAYER, 0))
        exit_at = layer.start if layer else 2 * self.num_layers
        mask = [bool(parameters[name]) or index >= exit_at for index, name in enumerate(self.bit_names)]
        return DraftConfig(
            SkipSet.from_mask(mask),
            draft_layer=layer,
            **{name: parameters.get(name, values[0]) for name, values in self.choices.items()},
        )

    def config_or_none(self, parameters: Mapping[str, Any]) -> DraftConfig | None:
        """The candidate that a trial with these parameters tried; None if it chose only some, or skipped everything."""
        if not self.distributions.keys() <= parameters.keys():
            return None
        try:
            return self.config(parameters)
        except InvalidInputError:
            return None

    def parameters(self, config: DraftConfig) -> dict[str, int | float | str]:
        """A candidate as the parameters of a trial; the inverse of :meth:`config`."""
        chosen: dict[str, int | float | str] = {}
        if self.draft_layers:
            layer = config.draft_layer
            chosen[DRAFT_LAYER] = 0 if layer is None else self.draft_layers.index(layer) + 1
        chosen |= dict(zip(self.bit_names, map(int, config.skip_set.mask), strict=True))
        chosen |= {name: getattr(config, name) for name, values in self.choices.items() if len(values) > 1}
        return chosen

    def draft_layer(self, number: int) -> DraftLayerRef | None:
        """The draft layer of a number from 1 on; None for 0."""
        return self.draft_layers[number - 1] if number else None

    def policies(self, config: DraftConfig) -> list[DraftConfig]:
        """A candidate with every policy without a tree that simulation tries."""
        longest = self.max_draft_length
        rules: list[DraftStopping] = [FixedLength(length) for length in range(1, longest + 1)]
        for length in sorted({min(length, longest) for length in _CONFIDENCE_LENGTHS}):
            rules += [ConfidenceThreshold(threshold, length) for threshold in CONFIDENCES]
        for length in sorted({min(length, longest) for length in _ADAPTIVE_LENGTHS}):
            rules += [AdaptiveThreshold(threshold, length) for threshold in _ADAPTIVE_STARTS]
        return [
            replace(config, stopping=rule, target_confidence_threshold=threshold)
            for threshold in self.target_confidence_thresholds
            for rule in rules
        ]
