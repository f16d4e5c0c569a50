"""Trained draft layers: profiles of them, made ready for a search to use above an early exit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from layerskip.drafting.config import DraftLayerRef
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile

# Hexadecimal digits of a checksum that tell one draft layer from another.
_DIGITS = 16


@dataclass(frozen=True, eq=False)
class TrainedDraftLayer:
    """A trained draft layer with its tensors.

    Args:
        ref: What tells it from others.
        weights: The layer, or the bridge, and the draft vocabulary that it was trained with; nothing else.
        training_seconds: How long it was trained, if that is known.
    """

    ref: DraftLayerRef
    weights: DraftWeights
    training_seconds: float | None = None


def trained_draft_layer(source: str, profile: DraftProfile, model: LayerSkipModel) -> TrainedDraftLayer:
    """The draft layer of a profile.

    Args:
        source: What to call the profile in errors.
        profile: The result of ``layerskip tune``, or of a search that used one.
        model: The model that is searched.

    Raises:
        InvalidProfileError: The profile is for another model.
        InvalidInputError: It has no draft layer that reaches the top of the stack, or one whose weights do not fit.
    """
    profile.check(model)
    if profile.drafts_with_heads:
        raise InvalidInputError(
            f"{source}: has draft heads, which draft without the stack, so that there is nothing for a search to skip; "
            "'layerskip compare' measures them beside other drafts"
        )
    weights = profile.weights
    top = len(model.sublayers)
    bridges = {start: bridge for start, bridge in weights.bridges.items() if bridge.stop == top}
    layers = {start: layer for start, layer in weights.layers.items() if layer.stop == top}
    if not bridges and not layers:
        raise InvalidInputError(
            f"{source}: has no draft layer in place of the layers above an early exit; "
            "train one with 'layerskip tune MODEL --exit LAYERS'"
        )
    own = DraftWeights(bridges, weights.token_ids, layers)
    try:
        own.to(torch.empty(0, dtype=model.dtype, device=model.device)).stand_ins(model)
    except InvalidInputError as error:
        raise InvalidInputError(f"{source}: {error}") from error
    ref = DraftLayerRef(
        start=next(iter({**bridges, **layers})),
        stop=top,
        kind="layer" if layers else "bridge",
        vocabulary_size=0 if own.token_ids is None else len(own.token_ids),
        sha256=hashlib.sha256(own.to_bytes()).hexdigest()[:_DIGITS],
    )
    return TrainedDraftLayer(ref, own, profile.provenance.training_seconds)


def trained_draft_layers(profiles: Mapping[str, DraftProfile], model: LayerSkipModel) -> tuple[TrainedDraftLayer, ...]:
    """The draft layers of several profiles, each once, in an order that does not depend on that of the profiles.

    Args:
        profiles: By where they come from.
        model: As in :func:`trained_draft_layer`.

    Raises:
        InvalidProfileError: As :func:`trained_draft_layer`.
        InvalidInputError: Likewise.
    """
    layers = [trained_draft_layer(source, profile, model) for source, profile in profiles.items()]
    by_ref = {layer.ref: layer for layer in layers}
    return tuple(by_ref[ref] for ref in sorted(by_ref))
