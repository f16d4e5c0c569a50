"""Trained stand-ins that a search may put in place of everything above an early exit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from layerskip.drafting.weights import DraftWeights, draft_layer_ref
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from layerskip.skip_set import SkipSet


@dataclass(frozen=True, order=True)
class DraftLayerRef:
    """What tells one trained stand-in from others, as plain values.

    Args:
        start: Index of the first sublayer that it stands for; all from there on are left out where it runs.
        stop: Index behind the last, the top of the stack.
        kind: A decoder layer, which remembers the text, or a bridge.
        vocabulary: Size of the draft vocabulary that it was trained with; 0 is the whole one.
        sha256: The first 16 hexadecimal digits of the checksum of its tensors, the vocabulary among them.
    """

    start: int
    stop: int
    kind: Literal["layer", "bridge"]
    vocabulary: int
    sha256: str

    def without_run(self, skip_set: SkipSet) -> SkipSet:
        """What a skip set leaves out below the stand-in."""
        return SkipSet.from_mask([skip and index < self.start for index, skip in enumerate(skip_set.mask)])

    def with_run(self, skip_set: SkipSet) -> SkipSet:
        """What a draft leaves out that runs the stand-in: whatever the skip set says, all that it stands for.

        Raises:
            InvalidInputError: Nothing would be left below it, or the skip set is for another number of layers.
        """
        if 2 * skip_set.num_layers != self.stop:
            raise InvalidInputError(
                f"stand-in: reaches sublayer {self.stop}, but there are {2 * skip_set.num_layers}; expected the top"
            )
        return SkipSet.from_mask([skip or index >= self.start for index, skip in enumerate(skip_set.mask)])

    def __str__(self) -> str:
        place = f"attn {self.start // 2}" if self.start % 2 else f"layer {self.start // 2}"
        return f"trained {self.kind} after {place} ({self.sha256[:8]})"


@dataclass(frozen=True, eq=False)
class TrainedDraftLayer:
    """A stand-in with its tensors.

    Args:
        name: What it is called.
        weights: Itself, and the draft vocabulary that it was trained with; nothing else.
        training_seconds: How long it was trained, if that is known.
    """

    name: DraftLayerRef
    weights: DraftWeights
    training_seconds: float | None = None


def trained_draft_layer(source: str, profile: DraftProfile, model: LayerSkipModel) -> TrainedDraftLayer:
    """The stand-in of a tuned profile.

    Args:
        source: What to call the profile in errors.
        profile: One of ``layerskip tune``, or of a search that used one.
        model: The model that the search is about.

    Raises:
        InvalidProfileError: The profile is for another model.
        InvalidInputError: It has no stand-in that reaches the top of the stack, or one whose weights do not fit.
    """
    profile.check(model)
    if profile.drafts_with_heads:
        raise InvalidInputError(
            f"{source}: has draft heads, which draft without the stack, so that there is nothing for a search to leave "
            "out; 'layerskip compare' measures them beside other drafts"
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
            f"{source}: has no stand-in for the layers above an early exit; "
            "train one with 'layerskip tune MODEL --exit LAYERS'"
        )
    name = DraftLayerRef(ref.start, ref.stop, ref.kind, ref.vocabulary_size, ref.sha256)
    return TrainedDraftLayer(name, own, profile.provenance.training_seconds)


def trained_draft_layers(profiles: Mapping[str, DraftProfile], model: LayerSkipModel) -> tuple[TrainedDraftLayer, ...]:
    """The stand-ins of several profiles, each once, in an order that does not depend on the one in which they come.

    Args:
        profiles: By where they come from.
        model: As in :func:`trained_draft_layer`.

    Raises:
        InvalidProfileError: As :func:`trained_draft_layer`.
        InvalidInputError: Likewise.
    """
    found = [trained_draft_layer(source, profile, model) for source, profile in profiles.items()]
    by_name = {one.name: one for one in found}
    return tuple(by_name[name] for name in sorted(by_name))
