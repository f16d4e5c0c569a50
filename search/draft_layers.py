"""Trained draft layers: profiles of them, made ready for a search to use above an early exit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerskip.drafting.config import DraftLayerRef
from layerskip.drafting.weights import DraftWeights, draft_layer_ref
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile


@dataclass(frozen=True, eq=False)
class TrainedDraftLayer:
    """A trained draft layer with its tensors.

    Args:
        ref: Identifies it.
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
            "'layerskip compare' compares them with other drafts"
        )
    try:
        weights = profile.weights(model)
    except InvalidInputError as error:
        raise InvalidInputError(f"{source}: {error}") from error
    top = len(model.sublayers)
    own = DraftWeights(
        bridges=[bridge for bridge in weights.bridges if bridge.stop == top],
        layers=[layer for layer in weights.layers if layer.stop == top],
        token_ids=weights.token_ids,
    )
    ref = draft_layer_ref(own.tensors(), top)
    if ref is None:
        raise InvalidInputError(
            f"{source}: has no draft layer in place of the layers above an early exit; "
            "train one with 'layerskip tune MODEL --exit LAYERS'"
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
