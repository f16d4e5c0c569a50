"""What a candidate costs on this machine: measured once by its parts, and added up for every candidate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pydantic import TypeAdapter

from layerskip.drafting.bridges import Bridge, blank_bridge
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.engine import Engine, PassCosts
from layerskip.engine.cost_measurement import exact_widths
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from layerskip.sublayers import AttentionSublayer, MLPSublayer, Stack
from layerskip.utils import device_seconds
from search.space import SearchSpace

# Context lengths at which all is measured; what lies between or beyond is on the line through them.
_CONTEXTS = (64, 512)
_REPEATS = 11
# Prompts cost much more than steps, and less depends on them.
_PREFILL_REPEATS = 3
# Of what was measured, the least that anything costs where the line would say that it is free.
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the parts of a draft step.

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

    def seconds(self, attention: int, mlp: int, bridges: int, vocabulary: int) -> float:
        """Of one draft step with so many sublayers and bridges, and a draft vocabulary of that size."""
        sublayers = attention * self.attention + mlp * self.mlp
        return self.fixed + sublayers + bridges * self.bridge + self.head[vocabulary]


@dataclass(frozen=True)
class CostsBehind:
    """Seconds of steps and passes behind a text.

    Args:
        context: The text's length.
        step: Of a draft step.
        passes: Of verifications.
        prefill: Of running the text itself.
    """

    context: int
    step: StepCosts
    passes: PassCosts
    prefill: float


@dataclass(frozen=True)
class LatencyModel:
    """Costs behind texts of two lengths, and on the line through them for every other length.

    Args:
        short: Behind the shorter text.
        long: Behind the longer one.
    """

    short: CostsBehind
    long: CostsBehind

    def draft_step(self, stack: Stack, context: float) -> float:
        """Seconds of one draft step behind ``context`` positions."""
        bridges = sum(isinstance(step, Bridge) for _, step in stack.steps)
        layers = sum(isinstance(step, DraftLayer) for _, step in stack.steps)
        sublayers = [step for _, step in stack.steps if isinstance(step, AttentionSublayer | MLPSublayer)]
        attention = sum(isinstance(step, AttentionSublayer) for step in sublayers)
        vocabulary = 0 if stack.token_ids is None else len(stack.token_ids)
        return self.parts(attention + layers, len(sublayers) - attention + layers, bridges, vocabulary, context)

    def parts(self, attention: int, mlp: int, bridges: int, vocabulary: int, context: float) -> float:
        """Seconds of a draft step made of these parts."""
        return self._at(context, lambda costs: costs.step.seconds(attention, mlp, bridges, vocabulary))

    def verification(self, needed: int, shared: float, context: float, choice: PassCosts | None) -> float:
        """Seconds of verifying ``needed - 1`` drafted tokens.

        Args:
            needed: Tokens in the pass.
            shared: Share of the sublayers below the draft's first skipped one; 0 if nothing was drafted.
            context: Positions before.
            choice: By which costs the engine chooses how to run the pass; None takes it as it is.
        """
        return self._at(context, lambda costs: _verification(costs.passes, needed, shared, choice))

    def prefill(self, length: float) -> float:
        """Seconds of running a prompt."""
        return self._at(length, lambda costs: costs.prefill)

    def _at(self, context: float, seconds: Callable[[CostsBehind], float]) -> float:
        near, far = seconds(self.short), seconds(self.long)
        if self.short.context == self.long.context:
            return near
        if far < near:  # noise: nothing gets ever cheaper the longer a text is
            context = min(max(context, self.short.context), self.long.context)
        line = near + (far - near) * (context - self.short.context) / (self.long.context - self.short.context)
        return max(line, _LEAST_SHARE * min(near, far))

    def as_json(self) -> str:
        """The model as text, to be kept with a study."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> LatencyModel:
        """The inverse of :meth:`as_json`."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(LatencyModel)


def _verification(passes: PassCosts, needed: int, shared: float, choice: PassCosts | None) -> float:
    width = needed if choice is None else choice.cheapest_width(needed)
    if width not in passes.sublayers:  # these were measured when the engine chose by other costs
        width = passes.cheapest_width(needed)
    saved = 0.0
    if choice is not None and shared and choice.saved_by_resuming(width, shared) > 0:
        saved = passes.saved_by_resuming(width, shared)
    return passes.seconds(width) - saved


@torch.inference_mode()
def measure_latency(engine: Engine, space: SearchSpace) -> LatencyModel:
    """Measure a model's parts where it lies, interleaved, as medians.

    Args:
        engine: Runs the passes of the model.
        space: What candidates may be made of.
    """
    room = engine.model.context_length - max(_widths(engine, space))
    contexts = [max(min(context, room), 1) for context in _CONTEXTS]
    near, far = (_behind(engine, space, context) for context in contexts)
    return LatencyModel(near, far)


def _behind(engine: Engine, space: SearchSpace, context: int) -> CostsBehind:
    """All of it interleaved: a machine that is slower for a while is slower for every part."""
    model = engine.model
    widths, stacks = _widths(engine, space), _sample_stacks(model, space)
    cache = engine.new_cache(context + max(widths))
    tokens = torch.zeros(max(context, *widths), dtype=torch.long, device=model.device)
    prefill = []
    for _ in range(_PREFILL_REPEATS):
        cache.rollback(0)
        prefill.append(_seconds(model, lambda: engine.prefill(tokens[:context], cache)))
    states = model.embed(tokens[: max(widths)])

    def step(name: str) -> None:
        engine.draft_step(tokens[:1], cache, stacks[name])
        cache.rollback(context)

    def verify(width: int) -> None:
        engine.verify(tokens[:width], cache)
        cache.rollback(context)

    runs: dict[str, Callable[[], object]] = {name: partial(step, name) for name in stacks}
    runs |= {f"verify {width}": partial(verify, width) for width in widths}
    runs |= {f"head {width}": partial(model.logits, states[:, :width]) for width in widths}
    with exact_widths(engine):
        medians = _interleaved(model, runs)
    whole, head = ({width: medians[f"{part} {width}"] for width in widths} for part in ("verify", "head"))
    step_costs = _step_costs(model.num_layers, space, medians, head[1])
    return CostsBehind(context, step_costs, PassCosts.of(whole, head), statistics.median(prefill))


def _step_costs(num_layers: int, space: SearchSpace, medians: Mapping[str, float], head: float) -> StepCosts:
    """From the seconds of the sample stacks, and of the head alone."""
    shorter = {size: medians[f"vocabulary {size}"] for size in space.vocabularies if size}
    half = len(range(0, num_layers, 2))
    attention = (medians["full"] - medians["half of attention"]) / half
    mlp = (medians["full"] - medians["half of mlp"]) / half
    return StepCosts(
        fixed=max(medians["full"] - num_layers * (attention + mlp) - head, 0.0),
        attention=max(attention, 0.0),
        mlp=max(mlp, 0.0),
        bridge=max((medians["bridged"] - medians["half of mlp"]) / half, 0.0),
        head={size: max(head + seconds - medians["full"], 0.0) for size, seconds in shorter.items()} | {0: head},
    )


def _widths(engine: Engine, space: SearchSpace) -> list[int]:
    """The widths at which drafts of any length would be verified."""
    needed = range(1, space.most_drafted + 2)
    choice = engine.costs
    return sorted({1, *(needed if choice is None else map(choice.cheapest_width, needed))})


def _sample_stacks(model: LayerSkipModel, space: SearchSpace) -> dict[str, Stack]:
    """Stacks whose differences tell what the parts cost, as far from full as drafts are."""
    all_kept = SkipSet(model.num_layers)
    vocabularies = {size: torch.linspace(0, model.vocab_size - 1, size).long() for size in space.vocabularies if size}
    every_second = tuple(range(0, model.num_layers, 2))
    no_mlp = SkipSet(model.num_layers, mlp=every_second)
    bridge = blank_bridge(model)
    return {
        "full": model.stack_of(all_kept),
        "half of attention": model.stack_of(SkipSet(model.num_layers, attention=every_second)),
        "half of mlp": model.stack_of(no_mlp),
        "bridged": model.stack_of(no_mlp, stand_ins={2 * layer + 1: bridge for layer in every_second}),
    } | {f"vocabulary {size}": model.stack_of(all_kept, token_ids=ids) for size, ids in vocabularies.items()}


def _interleaved(model: LayerSkipModel, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(_REPEATS + 1):
        for name, run in runs.items():
            measured = _seconds(model, run)
            if repeat:
                seconds[name].append(measured)
    return {name: float(np.median(measured)) for name, measured in seconds.items()}


def _seconds(model: LayerSkipModel, run: Callable[[], object]) -> float:
    started = device_seconds(model.device)
    run()
    return device_seconds(model.device) - started
