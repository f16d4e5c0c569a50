"""Draft configuration: everything that says how a model drafts for itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

from layerskip.checks import fraction, instance, shown, whole_number
from layerskip.drafting.stopping import DraftStopping, FixedLength
from layerskip.errors import InvalidInputError
from layerskip.names import PRECISIONS, Precision
from layerskip.skip_set import SkipSet
from layerskip.token_tree import describe_branches, widths_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True)
class PromptLookup:
    """When to copy draft tokens from the text, and how many.

    What followed the longest run of tokens at the end of the text that occurred before is copied, however long that is.

    Args:
        shortest: Shortest run that must have occurred before.
        length: Most tokens in a draft.
        per_match: Most copied tokens for each token of the run: the longer it is, the more certain is what follows.

    Raises:
        InvalidInputError: A number is below 1.
    """

    shortest: int = 2
    length: int = 15
    per_match: int = 2
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how DraftProfile reads it from JSON

    def __post_init__(self) -> None:
        for name in ("shortest", "length", "per_match"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def __str__(self) -> str:
        matching = f"{self.shortest} matching token{'s' * (self.shortest > 1)}"
        return f"prompt lookup from {matching} on, {self.per_match} copied for each, at most {self.length}"


@dataclass(frozen=True, order=True)
class DraftLayerRef:
    """Which trained layer runs in place of everything above an early exit, as plain values.

    Args:
        start: Index of the first sublayer that it replaces; all from there on are skipped.
        stop: Index after the last, the top of the stack.
        kind: A decoder layer, which keeps keys and values of its own, or an affine bridge.
        vocabulary_size: Size of the draft vocabulary that it was trained with; 0 is the whole one.
        sha256: The first 16 hexadecimal digits of the checksum of its tensors, the vocabulary among them.
    """

    start: int
    stop: int
    kind: Literal["layer", "bridge"]
    vocabulary_size: int
    sha256: str

    def __str__(self) -> str:
        exit_point = f"attn {self.start // 2}" if self.start % 2 else f"layer {self.start // 2}"
        return f"trained {self.kind} after {exit_point} ({self.sha256[:8]})"


@dataclass(frozen=True)
class DraftConfig:
    """How to draft: what of the stack runs, and when and how much to propose.

    The first four fields and the precision are the *candidate* that a search tries; the others are its *policy*, which
    simulation picks.

    Args:
        skip_set: Sublayers that the draft skips; none where draft heads propose. With a draft layer, everything above
            its early exit is skipped, whether it is named or not.
        bridges: Whether runs of skipped sublayers are replaced by bridges, where that is worth one.
        draft_layer: A trained layer in place of everything above an early exit; None without one.
        vocabulary_size: Number of tokens that the draft's head scores; 0 is the whole vocabulary.
        stopping: When a draft ends.
        target_confidence_threshold: Draft nothing after a round at whose end the target's highest probability was below
            this; 0 always drafts.
        tree: How many tokens to propose for the first place of a draft, for the second, and so on; one for later
            places. A number counts those after the first token of the place before; a list, for draft heads alone,
            those after each of its tokens.
        prompt_lookup: Copies from the text that are tried before the model drafts, and continue what it drafts; None
            copies nothing.
        precision: Of the sublayers that are kept, and of the head: ``full`` runs the model's own; ``int8`` and ``int4``
            run copies that were rounded to so many bits, at ``int4`` with a head of 8 bits. Bridges and draft layers
            keep theirs.

    Raises:
        InvalidInputError: The threshold or the tree is out of range, there is no such precision, or the draft layer
            does not fit the skip set.
    """

    skip_set: SkipSet
    bridges: bool = False
    draft_layer: DraftLayerRef | None = None
    vocabulary_size: int = 0
    stopping: DraftStopping = field(default_factory=FixedLength)
    target_confidence_threshold: float = 0.0
    tree: tuple[int | tuple[int, ...], ...] = ()
    prompt_lookup: PromptLookup | None = None
    precision: Precision = "full"

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        instance("skip_set", self.skip_set, SkipSet)
        if isinstance(self.stopping, type) or not hasattr(self.stopping, "new_state"):
            raise InvalidInputError(f"stopping: expected a stopping rule, got {shown(self.stopping)}")
        if self.prompt_lookup is not None:
            instance("prompt_lookup", self.prompt_lookup, PromptLookup)
        threshold = fraction("target_confidence_threshold", self.target_confidence_threshold)
        object.__setattr__(self, "target_confidence_threshold", threshold)
        if not isinstance(self.precision, str) or self.precision not in PRECISIONS:
            raise InvalidInputError(f"precision: expected {' or '.join(PRECISIONS)}, got {shown(self.precision)}")
        widths_of(self.tree)
        if self.draft_layer is not None:
            object.__setattr__(self, "skip_set", _early_exit(self.skip_set, self.draft_layer))

    @property
    def exit_at(self) -> int:
        """Index of the first sublayer that the draft layer replaces; without one, the number of all sublayers."""
        return 2 * self.skip_set.num_layers if self.draft_layer is None else self.draft_layer.start

    @property
    def skipped_below(self) -> SkipSet:
        """The skipped sublayers that no draft layer replaces."""
        return SkipSet.from_mask([skip and index < self.exit_at for index, skip in enumerate(self.skip_set.mask)])

    @property
    def policy(self) -> str:
        """When and how much is proposed, for people, such as ``4 tokens; tree 2-2``."""
        parts = [str(self.stopping)]
        if self.tree:
            parts.append(f"tree {describe_branches(self.tree)}")
        if self.prompt_lookup is not None:
            parts.append(str(self.prompt_lookup))
        if self.target_confidence_threshold:
            parts.append(f"no draft where target confidence < {self.target_confidence_threshold:g}")
        return "; ".join(parts)

    @property
    def details(self) -> str:
        """Everything but the skip set, for people, such as ``4 tokens · int4 · bridges · vocabulary 8192``."""
        layer = [] if self.draft_layer is None else [str(self.draft_layer)]
        vocabulary = [f"vocabulary {self.vocabulary_size}"] * bool(self.vocabulary_size)
        precision = [self.precision] * (self.precision != "full")
        return " · ".join([self.policy, *precision, *layer, *["bridges"] * self.bridges, *vocabulary])

    def __str__(self) -> str:
        return f"{self.skip_set} · {self.details}"

    def to_json(self) -> str:
        """The configuration as text."""
        return _adapter().dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> DraftConfig:
        """The inverse of :meth:`to_json`."""
        return _adapter().validate_json(text)


@cache
def _adapter() -> TypeAdapter[DraftConfig]:
    from pydantic import TypeAdapter  # which passes themselves do without

    return TypeAdapter(DraftConfig)


def _early_exit(skip_set: SkipSet, layer: DraftLayerRef) -> SkipSet:
    """The skip set with everything skipped that a draft layer replaces.

    Raises:
        InvalidInputError: Nothing would be left below the layer, or it does not reach the top of the stack.
    """
    if layer.stop != 2 * skip_set.num_layers:
        raise InvalidInputError(
            f"draft layer: ends before sublayer {layer.stop}, but there are {2 * skip_set.num_layers}; expected the top"
        )
    return SkipSet.from_mask([skip or index >= layer.start for index, skip in enumerate(skip_set.mask)])
