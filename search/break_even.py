"""Whether speculation can pay on a machine, before anything is searched: which agreement a draft would need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerskip.costs import speedup
from layerskip.engine import Engine
from search.latency import LatencyModel, measure_latency
from search.space import SearchSpace

# A text of usual length.
_CONTEXT = 128
# Acceptance rates whose speedup is foretold: a poor draft's, a usual one's, a good one's.
_RATES = (0.6, 0.75, 0.9)
# Above this, a draft agrees so often only where next to nothing is left out.
_HOPELESS_RATE = 0.97


@dataclass(frozen=True)
class DraftShape:
    """What a draft is made of, whatever it says.

    Args:
        name: For people.
        attention: Attention sublayers that it runs.
        mlp: MLP sublayers that it runs.
        bridges: Bridges that it runs.
        vocabulary: Size of its draft vocabulary; 0 is the whole one.
    """

    name: str
    attention: int
    mlp: int
    bridges: int
    vocabulary: int


@dataclass(frozen=True)
class DraftBreakEven:
    """What a draft of some shape would need, and bring.

    Args:
        draft: Its shape, for people.
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


@dataclass(frozen=True)
class BreakEven:
    """Whether speculation can pay for a model on a machine.

    Args:
        step_seconds: Of one plain decoding step.
        verification: Cost v(k) of verifying k tokens, in units of a plain step, by k.
        drafts: Of typical shapes.
    """

    step_seconds: float
    verification: Mapping[int, float]
    drafts: tuple[DraftBreakEven, ...]

    @property
    def best(self) -> DraftBreakEven | None:
        """The draft that needs least agreement to break even; None if none ever does."""
        able = [draft for draft in self.drafts if draft.break_even is not None]
        return min(able, key=lambda draft: draft.break_even or 0.0, default=None)

    @property
    def can_pay(self) -> bool:
        """Whether some draft needs an agreement that drafts have been seen to reach."""
        return self.best is not None and (self.best.break_even or 0.0) < _HOPELESS_RATE


def measure_break_even(engine: Engine) -> BreakEven:
    """Measure what the parts of a step cost, which takes up to a minute or so, and work out the rest.

    Args:
        engine: Runs the passes of the model where it would decode, and knows what they cost.
    """
    space = SearchSpace.of(engine.model)
    latency = measure_latency(engine, space)
    choice = engine.costs
    plain = latency.verification(1, 0.0, _CONTEXT, choice)
    widths = range(1, space.max_draft_length + 2)
    verification = {width: latency.verification(width, 0.0, _CONTEXT, choice) / plain for width in widths}
    drafts = [_payoff(shape, _cost(latency, shape) / plain, verification) for shape in typical_drafts(space)]
    return BreakEven(plain, verification, tuple(drafts))


def typical_drafts(space: SearchSpace) -> list[DraftShape]:
    """Drafts of the kinds that searches find, from nearly the whole model to a small part of it."""
    layers = space.num_layers
    vocabulary = space.vocabulary_sizes[len(space.vocabulary_sizes) // 2]
    head = f", vocabulary of {vocabulary}" if vocabulary else ""
    shapes = [DraftShape(f"nothing skipped{head}", layers, layers, 0, vocabulary)] if vocabulary else []
    for share, words in ((4, "a quarter"), (2, "half")):
        kept = layers - layers // share
        shapes.append(DraftShape(f"{words} of the sublayers skipped", kept, kept, 0, 0))
    kept, bridges = layers - layers // 2, max(layers // 8, 1)
    return [*shapes, DraftShape(f"half of the sublayers skipped, bridged{head}", kept, kept, bridges, vocabulary)]


def break_even(length: int, cost: float, verification: float) -> float | None:
    """Least acceptance rate at which :func:`speedup` is 1; None if it is below 1 at every rate."""
    if speedup(1.0, length, cost, verification) < 1:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-6:  # the speedup only rises with the rate
        middle = (low + high) / 2
        low, high = (low, middle) if speedup(middle, length, cost, verification) >= 1 else (middle, high)
    return high


def _cost(latency: LatencyModel, shape: DraftShape) -> float:
    return latency.parts(shape.attention, shape.mlp, shape.bridges, shape.vocabulary, _CONTEXT)


def _payoff(shape: DraftShape, cost: float, verification: Mapping[int, float]) -> DraftBreakEven:
    lengths = [width - 1 for width in verification if width > 1]
    needed = {length: break_even(length, cost, verification[length + 1]) for length in lengths}
    able = {length: rate for length, rate in needed.items() if rate is not None}
    length = min(able, key=lambda length: able[length], default=lengths[0])
    speedups = {rate: max(speedup(rate, n, cost, verification[n + 1]) for n in lengths) for rate in _RATES}
    return DraftBreakEven(shape.name, cost, able.get(length), length, speedups)
