"""What passes cost on a machine, as measured, and the speedup that follows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Protocol

from layerskip.errors import InvalidInputError
from layerskip.names import PRECISIONS, Precision
from layerskip.sublayers import AttentionSublayer, MLPSublayer, Stack
from layerskip.utils import device_name, dtype_name

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from layerskip.model import LayerSkipModel

# Least share of a pass that its sublayers take, should a noisy moment say that its head took all of it; and of what was
# measured, the least that anything costs where the line through the measurements would say that it is free.
_LEAST_SHARE = 0.01


def speedup(acceptance: float, length: int, draft_cost: float, verification: float) -> float:
    """Tokens of a round over its cost: ``(1 - α^(γ + 1)) / (1 - α)`` tokens for ``γ·c + v`` plain steps.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), theorem 3.8.

    Args:
        acceptance: The acceptance rate α, from 0 to 1.
        length: The draft length γ.
        draft_cost: The cost c of a draft step, in plain decoding steps.
        verification: The cost v of verifying γ + 1 tokens, likewise.
    """
    # Summed up, and not by the closed form, which is 0 ÷ 0 where α is 1.
    return sum(acceptance**i for i in range(length + 1)) / (length * draft_cost + verification)


def best_speedup(acceptance: float, draft_cost: float, verification: Callable[[int], float], longest: int) -> float:
    """The :func:`speedup` at the best draft length.

    Args:
        acceptance: As in :func:`speedup`.
        draft_cost: Likewise.
        verification: The cost of verifying so many tokens, in plain decoding steps.
        longest: The longest draft to consider.
    """
    return max(speedup(acceptance, n, draft_cost, verification(n + 1)) for n in range(1, longest + 1))


@dataclass(frozen=True)
class DraftParts:
    """Number of the parts that a draft step runs.

    Args:
        attention: Attention sublayers.
        mlp: MLP sublayers.
        bridges: Bridges.
        vocabulary: Size of the draft vocabulary; 0 is the whole one.
        precision: Of the sublayers and of the head.
        layers: Draft layers, each of which costs as much as a layer of the model's at full precision.
    """

    attention: int
    mlp: int
    bridges: int = 0
    vocabulary: int = 0
    precision: Precision = "full"
    layers: int = 0

    @classmethod
    def of(cls, stack: Stack) -> DraftParts:
        """The parts of a stack."""
        steps = [step for _, step in stack.steps]
        layers = sum(step.remembers for step in steps)
        attention = sum(isinstance(step, AttentionSublayer) for step in steps)
        mlp = sum(isinstance(step, MLPSublayer) for step in steps)
        vocabulary = 0 if stack.token_ids is None else len(stack.token_ids)
        bridges = len(steps) - layers - attention - mlp
        return cls(attention, mlp, bridges, vocabulary, stack.precision, layers)


# A wider pass is chosen only if it costs less than so much of the one that is needed.
_CLEARLY_CHEAPER = 0.97


@dataclass(frozen=True)
class PassCosts:
    """Cost of a pass of the target model, by the number of tokens in it.

    Args:
        sublayers: Of all sublayers together.
        head: Of the final norm and the head.
    """

    sublayers: Mapping[int, float]
    head: Mapping[int, float]

    @classmethod
    def of(cls, whole: Mapping[int, float], head: Mapping[int, float]) -> PassCosts:
        """From seconds of whole passes and of their heads: the sublayers are the rest, however noisy the moment was."""
        head = {width: min(head[width], (1 - _LEAST_SHARE) * seconds) for width, seconds in whole.items()}
        return cls({width: seconds - head[width] for width, seconds in whole.items()}, head)

    def cost(self, width: int) -> float:
        """Of a whole pass of a measured width."""
        return self.sublayers[width] + self.head[width]

    @property
    def widest(self) -> int:
        """The largest measured width."""
        return max(self.sublayers)

    def cheapest_width(self, needed: int) -> int:
        """The width, at least ``needed``, whose pass costs least; ``needed`` itself beyond what was measured.

        ``needed`` itself, too, where another would gain less than measurements differ by.
        """
        wide_enough = [width for width in self.sublayers if width >= needed]
        cheapest = min(wide_enough, key=self.cost, default=needed)
        gains = needed not in self.sublayers or self.cost(cheapest) < _CLEARLY_CHEAPER * self.cost(needed)
        return cheapest if gains else needed

    def saved_by_resuming(self, width: int, share: float) -> float:
        """Cost saved if a pass starts after a share of the sublayers, which only one token has yet to go through.

        Negative where that one token costs more than taking all of them along.
        """
        return share * (self.sublayers.get(width, self.sublayers[self.widest]) - self.sublayers[1])


@dataclass(frozen=True)
class StepCosts:
    """Cost of the parts of a draft step.

    Args:
        fixed: Of everything else: embedding, rotary embedding, mask and choice.
        attention: Of one attention sublayer.
        mlp: Of one MLP sublayer.
        bridge: Of one bridge.
        head: Of the final norm and the head, by the size of the draft vocabulary; 0 is the whole one.
    """

    fixed: float
    attention: float
    mlp: float
    bridge: float
    head: Mapping[int, float]


@dataclass(frozen=True)
class Costs:
    """What passes cost after a text of some length, in seconds or in plain decoding steps.

    Args:
        context: The text's length.
        step: Of the parts of a draft step at full precision.
        passes: Of verifications.
        prefill: Of running the text itself.
        copies: As ``step``, by lower precision, where it was measured; bridges run at full precision in any draft.
    """

    context: float
    step: StepCosts
    passes: PassCosts
    prefill: float
    copies: Mapping[Precision, StepCosts] = field(default_factory=dict)

    @property
    def plain_step(self) -> float:
        """One step of plain decoding."""
        return self.verification(1)

    def draft_step(self, parts: DraftParts) -> float:
        """One step of a draft, whose precision was measured."""
        full = self.step
        step = full if parts.precision == "full" else self.copies[parts.precision]
        sublayers = parts.attention * step.attention + parts.mlp * step.mlp
        stand_ins = parts.bridges * full.bridge + parts.layers * (full.attention + full.mlp)
        return step.fixed + sublayers + stand_ins + step.head[parts.vocabulary]

    def verification(self, tokens: int, shared: float = 0.0) -> float:
        """One pass over so many tokens, at the cheapest width that has room for them.

        Args:
            tokens: The text's last token and the drafted ones; beyond the widest pass that was measured, that counts.
            shared: Share of the sublayers that drafting computed already, from which the pass resumes if that pays.
        """
        width = min(self.passes.cheapest_width(tokens), self.passes.widest)
        return self.passes.cost(width) - max(self.passes.saved_by_resuming(width, shared), 0.0)

    def relative(self) -> Costs:
        """The same in plain decoding steps."""
        plain = self.plain_step
        return _combined(self, self, lambda cost, _: cost / plain)


@dataclass(frozen=True)
class CostModel:
    """What passes cost on this machine, in seconds: measured after texts of two lengths, and on the line through them.

    Args:
        short: After the shorter text.
        long: After the longer one; as long as the shorter one where the model's context has no room for two.
    """

    short: Costs
    long: Costs

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions whose draft steps were measured."""
        return tuple(precision for precision in PRECISIONS if precision == "full" or precision in self.short.copies)

    def at(self, context: float) -> Costs:
        """After a text of any length."""
        contexts = (self.short.context, self.long.context)
        combined = _combined(self.short, self.long, lambda a, b: on_the_line((a, b), contexts, context))
        return replace(combined, context=context)

    def to_json(self) -> str:
        """The model as text, for a study; with spaces, where pages that show it may break its lines."""
        return json.dumps(_adapter().dump_python(self, mode="json"))

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: The text is not a cost model's.
        """
        return _adapter().validate_json(text)


class _Engine(Protocol):
    """What is asked of an engine here."""

    name: str
    model: LayerSkipModel


@dataclass(frozen=True)
class DraftRoundCosts:
    """What rounds of one draft cost, in seconds, after texts of two lengths; after others, on the line through them.

    Args:
        device: What they were measured on.
        dtype: In which floating-point type.
        engine: The name of the engine that ran the passes.
        contexts: The two lengths, ascending.
        drafting: Of drafting no, one, two and more places: a pair for each number.
        saved: What verification saves where it resumes from a draft of so many places, likewise.
        widths: Numbers of tokens in a verification, ascending from 1.
        verification: Of a verification of each width, likewise.

    Raises:
        InvalidInputError: A number is negative or none, a plain step takes no time, or numbers do not ascend or match.
    """

    device: str
    dtype: str
    engine: str
    contexts: tuple[float, float]
    drafting: tuple[tuple[float, float], ...]
    saved: tuple[tuple[float, float], ...]
    widths: tuple[int, ...]
    verification: tuple[tuple[float, float], ...]
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how DraftProfile reads it from JSON

    def __post_init__(self) -> None:
        if self.contexts[0] > self.contexts[1] or list(self.widths) != sorted({1, *self.widths}):
            raise InvalidInputError("costs: expected contexts that ascend, and widths that ascend from 1")
        counts = (len(self.widths), len(self.verification), len(self.drafting), len(self.saved))
        if counts[0] != counts[1] or counts[2] != counts[3] or not self.drafting:
            raise InvalidInputError(
                "costs: expected as many pairs of seconds for verification as widths, and for drafting as for what it "
                f"saves, got {counts[1]} for {counts[0]}, and {counts[2]} for {counts[3]}"
            )
        numbers = [*self.contexts, *chain.from_iterable((*self.drafting, *self.saved, *self.verification))]
        if not all(0 <= number < math.inf for number in numbers) or min(self.verification[0]) <= 0:
            raise InvalidInputError("costs: expected numbers from 0 on, and plain steps that take some time")

    @classmethod
    def of(
        cls,
        engine: _Engine,
        costs: CostModel,
        places: int,
        drafting: Callable[[Costs, int], float],
        saved: Callable[[Costs, int], float] = lambda at, places: 0.0,
    ) -> DraftRoundCosts:
        """From measured costs.

        Args:
            engine: Ran the passes.
            costs: What passes cost.
            places: The most places of a draft.
            drafting: Seconds of drafting so many places, from one on, at the costs after a text of some length.
            saved: Seconds that verification saves where it resumes from so many places.
        """

        def pairs(seconds: Callable[[Costs, int], float], numbers: Iterable[int]) -> Iterator[tuple[float, float]]:
            return ((_rounded(seconds(costs.short, n)), _rounded(seconds(costs.long, n))) for n in numbers)

        widths = tuple(sorted(costs.short.passes.sublayers))
        return cls(
            device_name(engine.model.device),
            dtype_name(engine.model.dtype),
            engine.name,
            (costs.short.context, costs.long.context),
            ((0.0, 0.0), *pairs(drafting, range(1, places + 1))),
            ((0.0, 0.0), *pairs(saved, range(1, places + 1))),
            widths,
            tuple(pairs(lambda at, width: at.passes.cost(width), widths)),
        )

    def are_of(self, engine: _Engine) -> bool:
        """Whether they were measured with such an engine, on such a device and in the dtype of its model."""
        here = (device_name(engine.model.device), dtype_name(engine.model.dtype), engine.name)
        return (self.device, self.dtype, self.engine) == here

    def plain_steps(self, context: int, *, places: int, tokens: int, resuming: bool = False) -> float:
        """A round in units of a plain decoding step.

        Args:
            context: The text's length.
            places: Places that the model drafts.
            tokens: Tokens to verify: the text's last and the drafted ones. Beyond the widest pass, that counts.
            resuming: Whether verification resumes from what drafting computed.
        """
        wide_enough = [pair for width, pair in zip(self.widths, self.verification, strict=True) if width >= tokens]
        passes = [self._at(pair, context) for pair in wide_enough or self.verification[-1:]]
        place = min(places, len(self.drafting) - 1)
        drafting = self._at(self.drafting[place], context) - resuming * self._at(self.saved[place], context)
        return (drafting + min(passes)) / self._at(self.verification[0], context)

    def _at(self, pair: tuple[float, float], context: int) -> float:
        return on_the_line(pair, self.contexts, context)


def on_the_line(costs: tuple[float, float], contexts: Sequence[float], context: float) -> float:
    """What something costs after a text of any length, by what it costs after texts of two lengths."""
    (short, long), (near, far) = costs, contexts
    if near == far:
        return short
    # What seems to get cheaper the longer a text is does so by noise: that is not drawn out.
    place = min(max(context, near), far) if long < short else context
    return max(short + (long - short) * (place - near) / (far - near), _LEAST_SHARE * min(short, long))


def _rounded(seconds: float) -> float:
    """To four digits, for more were not measured; from 0 on."""
    return max(float(f"{seconds:.4g}"), 0.0)


@cache
def _adapter() -> TypeAdapter[CostModel]:
    from pydantic import TypeAdapter  # which passes themselves do without

    return TypeAdapter(CostModel)


def _combined(first: Costs, second: Costs, combine: Callable[[float, float], float]) -> Costs:
    """Two costs as a third, number by number, after the context of the first."""

    def by_size(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
        return {size: combine(cost, b[size]) for size, cost in a.items()}

    def of_step(a: StepCosts, b: StepCosts) -> StepCosts:
        return StepCosts(
            fixed=combine(a.fixed, b.fixed),
            attention=combine(a.attention, b.attention),
            mlp=combine(a.mlp, b.mlp),
            bridge=combine(a.bridge, b.bridge),
            head=by_size(a.head, b.head),
        )

    passes = PassCosts(
        by_size(first.passes.sublayers, second.passes.sublayers), by_size(first.passes.head, second.passes.head)
    )
    return Costs(
        first.context,
        of_step(first.step, second.step),
        passes,
        combine(first.prefill, second.prefill),
        {precision: of_step(costs, second.copies[precision]) for precision, costs in first.copies.items()},
    )
