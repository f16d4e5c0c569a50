"""Whether speculation can pay on a machine, and which acceptance rate a draft would need: known before any search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerskip.costs import DraftParts, speedup
from layerskip.engine import Engine, measure_costs
from search.space import SearchSpace

# A text of usual length.
_CONTEXT = 128
# Acceptance rates whose speedup is predicted: a poor draft's, a usual one's, a good one's.
_RATES = (0.6, 0.75, 0.9)
# Drafts reach a higher rate only where next to nothing is skipped.
_HOPELESS_RATE = 0.97


@dataclass(frozen=True)
class DraftBreakEven:
    """The acceptance rate that a kind of draft needs, and the speedups that it would give.

    Args:
        draft: The kind of draft, human-readable.
        cost: Of one draft step, in units of a plain decoding step.
        break_even: Least acceptance rate from which it is no slower than plain decoding; None if even a draft that is
            always right is slower.
        length: The draft length at which it needs that little.
        speedups: The best speedup over all draft lengths, by acceptance rate.
    """

    draft: str
    cost: float
    break_even: float | None
    length: int
    speedups: Mapping[float, float]

    @classmethod
    def of(cls, draft: str, cost: float, verification: Mapping[int, float]) -> DraftBreakEven:
        """From the costs of a draft step and of verifying ``k`` tokens, by ``k``, in units of a plain step."""
        lengths = [width - 1 for width in verification if width > 1]
        rates = {length: break_even(length, cost, verification[length + 1]) for length in lengths}
        reachable = {length: rate for length, rate in rates.items() if rate is not None}
        length = min(reachable, key=lambda length: reachable[length], default=lengths[0])
        speedups = {rate: max(speedup(rate, n, cost, verification[n + 1]) for n in lengths) for rate in _RATES}
        return cls(draft, cost, reachable.get(length), length, speedups)


@dataclass(frozen=True)
class Shortfall:
    """Why a draft that was measured does not pay.

    Args:
        acceptance: Its one-step acceptance rate α.
        needed: What a draft at its cost would need.
        verification: Cost v of verifying a draft of the length at which it needs least, in units of a plain step.
    """

    acceptance: float
    needed: DraftBreakEven
    verification: float

    def describe(self) -> str:
        """Human-readable."""
        needed = self.needed
        costs = (
            f"a draft step costs {needed.cost:.2f} of a plain step here, and verifying {needed.length + 1} tokens "
            f"{self.verification:.2f}"
        )
        if needed.break_even is None:
            return f"{costs}: even a draft that is always right would be slower"
        right = f"{self.acceptance:.0%} of its tokens are right, of {needed.break_even:.0%} that it would need"
        if self.acceptance < needed.break_even:
            return f"{right}: {costs}"
        return f"by its costs it should pay ({right}: {costs}), so held-out prompts are harder, or the machine was busy"


@dataclass(frozen=True)
class BreakEven:
    """Whether speculation can pay for a model on a machine.

    Args:
        step_seconds: Of one plain decoding step.
        verification: Cost v(k) of verifying k tokens, in units of a plain step, by k.
        drafts: Of typical kinds.
    """

    step_seconds: float
    verification: Mapping[int, float]
    drafts: tuple[DraftBreakEven, ...]

    @property
    def best(self) -> DraftBreakEven | None:
        """The draft that breaks even at the lowest acceptance rate; None if none ever does."""
        able = [draft for draft in self.drafts if draft.break_even is not None]
        return min(able, key=lambda draft: draft.break_even or 0.0, default=None)

    @property
    def can_pay(self) -> bool:
        """Whether some draft breaks even at an acceptance rate that drafts reach."""
        return self.best is not None and (self.best.break_even or 0.0) < _HOPELESS_RATE


def measure_break_even(engine: Engine) -> BreakEven:
    """Measure what passes cost, which takes up to a minute or so, and work out the rest.

    Args:
        engine: Runs the passes of the model where it would decode, and knows what they cost.
    """
    space = SearchSpace.of(engine.model)
    measured = measure_costs(
        engine,
        vocabularies=space.vocabulary_sizes,
        most_drafted=space.most_drafted,
        precisions=space.precisions,
    ).at(_CONTEXT)
    costs = measured.relative()
    verification = {width: costs.verification(width) for width in range(1, space.max_draft_length + 2)}
    drafts = [
        DraftBreakEven.of(name, costs.draft_step(parts), verification) for name, parts in typical_drafts(space).items()
    ]
    return BreakEven(measured.plain_step, verification, tuple(drafts))


def typical_drafts(space: SearchSpace) -> dict[str, DraftParts]:
    """Drafts of the kinds that searches find, by name, from nearly the whole model to a small part of it."""
    layers = space.num_layers
    vocabulary = space.vocabulary_sizes[len(space.vocabulary_sizes) // 2]
    head = f", vocabulary of {vocabulary}" if vocabulary else ""
    drafts = {
        f"nothing skipped, {precision}": DraftParts(layers, layers, precision=precision)
        for precision in reversed(space.precisions)
        if precision != "full"
    }
    if vocabulary:
        drafts[f"nothing skipped{head}"] = DraftParts(layers, layers, vocabulary=vocabulary)
    for share, words in ((4, "a quarter"), (2, "half")):
        kept = layers - layers // share
        drafts[f"{words} of the sublayers skipped"] = DraftParts(kept, kept)
    half, bridges = layers - layers // 2, max(layers // 8, 1)
    return drafts | {f"half of the sublayers skipped, bridged{head}": DraftParts(half, half, bridges, vocabulary)}


def break_even(length: int, cost: float, verification: float) -> float | None:
    """Least acceptance rate at which :func:`speedup` is 1; None if it is below 1 at every rate."""
    if speedup(1.0, length, cost, verification) < 1:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-6:  # the speedup only rises with the rate
        middle = (low + high) / 2
        low, high = (low, middle) if speedup(middle, length, cost, verification) >= 1 else (middle, high)
    return high
