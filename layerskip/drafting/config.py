"""Draft configuration: everything that says how a model drafts for itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import TypeAdapter

from layerskip.drafting.prompt_lookup import PromptLookup
from layerskip.drafting.stopping import DraftStopping, FixedLength
from layerskip.errors import InvalidInputError
from layerskip.skip_set import SkipSet
from layerskip.token_tree import describe_branches


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

    The first four fields are the *candidate* that a search tries; the others are its *policy*, which simulation picks.

    Args:
        skip_set: Sublayers that the draft skips; none where draft heads propose. All that a draft layer replaces are
            added, whether they are named or not.
        bridges: Whether runs of skipped sublayers are replaced by bridges, where that is worth one.
        draft_layer: A trained layer in place of everything above an early exit; None without one.
        vocabulary_size: Number of tokens that the draft's head scores; 0 is the whole vocabulary.
        stopping: When a draft ends.
        target_confidence_threshold: Draft nothing after a round at whose end the target's highest probability was below
            this; 0 always drafts.
        tree: How many tokens to propose for the first place of a draft, for the second, and so on; one for later
            places. A number counts those after the first token of the place before; a list, for draft heads alone,
            those after each of its tokens.
        prompt_lookup: Copies from the text that are tried before the model drafts; None copies nothing.

    Raises:
        InvalidInputError: Nothing would be kept below the draft layer, or it is for another number of layers.
    """

    skip_set: SkipSet
    bridges: bool = False
    draft_layer: DraftLayerRef | None = None
    vocabulary_size: int = 0
    stopping: DraftStopping = field(default_factory=FixedLength)
    target_confidence_threshold: float = 0.0
    tree: tuple[int | tuple[int, ...], ...] = ()
    prompt_lookup: PromptLookup | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.draft_layer is None:
            return
        mask = self.skip_set.mask
        if len(mask) != self.draft_layer.stop:
            raise InvalidInputError(
                f"draft layer: reaches sublayer {self.draft_layer.stop}, but there are {len(mask)}; expected the top"
            )
        filled = SkipSet.from_mask([skip or index >= self.exit_at for index, skip in enumerate(mask)])
        object.__setattr__(self, "skip_set", filled)

    @property
    def exit_at(self) -> int:
        """Index of the first sublayer that the draft layer replaces; without one, the number of all sublayers."""
        return 2 * self.skip_set.num_layers if self.draft_layer is None else self.draft_layer.start

    @property
    def skipped_below(self) -> SkipSet:
        """The skipped sublayers below the draft layer, which bridges may replace; without one, all of them."""
        return SkipSet.from_mask([skip and index < self.exit_at for index, skip in enumerate(self.skip_set.mask)])

    @property
    def details(self) -> str:
        """Everything but the skip set, for people."""
        policy = [str(self.stopping)]
        if self.tree:
            policy.append(f"tree {describe_branches(self.tree)}")
        if self.prompt_lookup:
            policy.append(str(self.prompt_lookup))
        if self.target_confidence_threshold:
            policy.append(f"target confidence at least {self.target_confidence_threshold:g}")
        parts = [", ".join(policy)]
        if self.draft_layer:
            parts.append(str(self.draft_layer))
        if self.bridges:
            parts.append("bridges")
        if self.vocabulary_size:
            parts.append(f"vocabulary {self.vocabulary_size}")
        return " · ".join(parts)

    def __str__(self) -> str:
        return f"{self.skip_set} · {self.details}"

    def to_json(self) -> str:
        """The configuration as text."""
        return _JSON.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> DraftConfig:
        """The inverse of :meth:`to_json`."""
        return _JSON.validate_json(text)


_JSON = TypeAdapter(DraftConfig)
