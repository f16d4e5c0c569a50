"""Draft builder: makes the weights, the stack and the drafter that a draft configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerskip.costs import CostModel, DraftParts, DraftRoundCosts
from layerskip.drafting.bridges import Bridge, BridgeFitter, without_outliers
from layerskip.drafting.config import DraftConfig, DraftLayerRef
from layerskip.drafting.drafter import Drafter
from layerskip.drafting.factory import make_drafter
from layerskip.drafting.vocabulary import draft_vocabulary, emission_frequencies
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import Engine
from layerskip.model import LayerSkipModel
from layerskip.names import Precision
from layerskip.sublayers import Stack, Step
from layerskip.target_texts import TargetText
from search.draft_layers import TrainedDraftLayer
from search.prompts import EncodedPrompt
from search.reference import ReferenceRun

# Positions of hidden states that bridges are fitted to, over all texts.
_FIT_POSITIONS = 2048


def fit_texts(run: ReferenceRun, prompts: Sequence[EncodedPrompt], *, max_new_tokens: int) -> list[TargetText]:
    """The texts that drafts learn from, with hidden states at positions all over them."""
    return run.texts(prompts, max_new_tokens=max_new_tokens, states=max(_FIT_POSITIONS // len(prompts), 1))


def stack_round_costs(engine: Engine, costs: CostModel, stack: Stack, config: DraftConfig) -> DraftRoundCosts:
    """What rounds of a draft of the stack cost.

    Args:
        engine: Runs the passes.
        costs: What passes cost.
        stack: The draft's.
        config: How it drafts.
    """
    parts, share = DraftParts.of(stack), stack.shared / len(engine.model.sublayers)
    return DraftRoundCosts.of(
        engine,
        costs,
        config.stopping.new_state().max_length,
        drafting=lambda at, places: places * at.draft_step(parts),
        saved=lambda at, places: at.verification(places + 1) - at.verification(places + 1, share),
    )


class DraftBuilder:
    """Builds drafts: bridges and draft vocabularies are fitted to reference texts, draft layers were trained before.

    Args:
        model: The model.
        texts: What the target model wrote, with hidden states at positions all over them.
        draft_layers: Trained draft layers that configurations may name.
    """

    def __init__(
        self, model: LayerSkipModel, texts: Sequence[TargetText], draft_layers: Sequence[TrainedDraftLayer] = ()
    ) -> None:
        states = without_outliers(torch.cat([text.states for text in texts], dim=1))
        self._model = model
        self._fitter = BridgeFitter(model, states)
        self._frequencies = emission_frequencies(model, states[-1].to(model.device))
        self._heads: dict[tuple[int, DraftLayerRef | None, Precision], Stack] = {}
        self._trained = {layer.ref: layer for layer in draft_layers}
        self._built = {layer.ref: layer.weights.placed_on(model).steps for layer in draft_layers}

    def as_built(self, config: DraftConfig) -> DraftConfig:
        """The configuration as its draft is built: without bridges where no run that it skips gets one."""
        runs = config.bridges and self._fitter.runs_to_bridge(config.skipped_below)
        return replace(config, bridges=bool(runs))

    def weights(self, config: DraftConfig) -> DraftWeights:
        """The bridges, the draft layer and the draft vocabulary of a draft; the layer as it was trained."""
        ids = self._head(config).token_ids
        bridges = self._bridges(config)
        if config.draft_layer is None:
            return DraftWeights(bridges=bridges, token_ids=ids)
        trained = self._trained[config.draft_layer].weights
        return DraftWeights(bridges=[*bridges, *trained.bridges], layers=trained.layers, token_ids=ids)

    def training_seconds(self, config: DraftConfig) -> float | None:
        """How long the draft layer was trained, if there is one and that is known."""
        return None if config.draft_layer is None else self._trained[config.draft_layer].training_seconds

    def stack(self, config: DraftConfig) -> Stack:
        """The stack that a draft runs."""
        steps: dict[int, Step] = {bridge.start: bridge for bridge in self._bridges(config)}
        if config.draft_layer is not None:
            steps |= self._built[config.draft_layer]
        stack = self._model.stack_of(config.skip_set, stand_ins=steps, precision=config.precision)
        return stack.with_head_of(self._head(config))

    def drafter(self, config: DraftConfig, costs: DraftRoundCosts | None = None) -> Drafter:
        """The drafter of a configuration; with costs, it pauses where drafting does not pay."""
        return make_drafter(self._model, config, self.weights(config), costs=costs)

    def round_costs(self, engine: Engine, config: DraftConfig, costs: CostModel) -> DraftRoundCosts:
        """What rounds of a draft cost with an engine, by what its passes cost."""
        return stack_round_costs(engine, costs, self.stack(config), config)

    def num_bridges(self, masks: NDArray[np.bool_]) -> NDArray[np.intp]:
        """How many bridges are fitted for each of several drafts with bridges.

        Args:
            masks: ``[n, sublayers]``, what each skips below its draft layer.

        Returns:
            ``[n]``.
        """
        edges = np.diff(np.pad(masks, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        (drafts, starts), (_, stops) = np.nonzero(edges == 1), np.nonzero(edges == -1)
        return np.bincount(drafts[self._bridged[starts, stops]], minlength=len(masks))

    @cached_property
    def _bridged(self) -> NDArray[np.bool_]:
        """``[boundaries, boundaries]``, whether a run of skipped sublayers from one to another gets a bridge."""
        boundaries = range(len(self._model.sublayers) + 1)
        return np.array([[self._fitter.is_cheaper(start, stop) for stop in boundaries] for start in boundaries])

    def _bridges(self, config: DraftConfig) -> list[Bridge]:
        return self._fitter.fit(config.skipped_below) if config.bridges else []

    def _head(self, config: DraftConfig) -> Stack:
        """The head of a draft vocabulary; made once, because its rows are copied.

        A draft layer's own vocabulary takes the place of the fitted one of that size.
        """
        size, layer = config.vocabulary_size, config.draft_layer
        own = layer if layer is not None and 0 < layer.vocabulary_size == size else None
        key = size, own, config.precision
        if key not in self._heads:
            ids = self._fitted_ids(size) if own is None else self._trained[own].weights.token_ids
            self._heads[key] = self._model.head_of(ids, config.precision)
        return self._heads[key]

    def _fitted_ids(self, size: int) -> Tensor | None:
        return draft_vocabulary(self._frequencies, self._model.eos_token_ids, size) if size else None
