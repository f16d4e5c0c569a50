"""Measure what an engine's passes cost on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from layerskip.checkpoints import cache_folder
from layerskip.costs import CostModel, Costs, PassCosts, StepCosts, on_the_line
from layerskip.drafting.bridges import blank_bridge
from layerskip.engine.base import Engine
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.names import Precision
from layerskip.skip_set import SkipSet
from layerskip.sublayers import Stack
from layerskip.utils import device_name, device_seconds, digest, library_versions, measured_once

# Wide enough for the largest tree that a search tries, and for the dips that CPUs have.
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24)
# A text of usual length, after which an engine's own costs are measured; attention is a small part of a pass until
# contexts are much longer.
_CONTEXT = 128
_REPEATS = 7
# Changes when the same passes would be measured as something else, so that costs of earlier versions are not used.
_METHOD = 3
# The lengths of a cost model, and its repeats. The longer one is long, for the line through both is drawn out to the
# end of the model's context; with the widest pass and a tree's leaves it fits a bucket of 2,048 positions.
_CONTEXTS = (64, 1900)
_MODEL_REPEATS = 11
# Prompts cost much more than steps, and less depends on them.
_PROMPTS = (64, 512)
_PREFILL_REPEATS = 3


def load_costs(engine: Engine, folder: Path | None = None) -> PassCosts:
    """What an engine's passes cost: as measured for the same model, device, dtype and software earlier, or now.

    Args:
        engine: The engine; it must not be in the middle of a generation.
        folder: Where measured costs are kept; None is :func:`layerskip.checkpoints.cache_folder`.

    Returns:
        The costs, in seconds by the number of tokens in a pass. Assign them to the engine's ``costs``, and verification
        runs at the cheapest width.
    """
    file = (folder or cache_folder()) / f"costs-{_key(engine)}.json"
    return measured_once(file, PassCosts, lambda: measure_passes(engine), "passes cost")


def _key(engine: Engine) -> str:
    """Changes with everything that the duration of a pass depends on."""
    model = engine.model
    config = model.config.to_diff_dict()
    where = [str(model.dtype), device_name(model.device), model.config._attn_implementation, library_versions()]
    engine_kind = [
        engine.name,
        *(getattr(engine, name, False) for name in ("plain_one_row", "in_place")),
        model.compiled,
    ]
    what = [config, WIDTHS, _module_kinds(model.hf_model), *engine_kind, _METHOD, *where]
    return digest(what)


def _module_kinds(model: nn.Module) -> list[tuple[str, ...]]:
    """The kinds of modules and of their weights, which tell an adapted or a quantized model from the plain one."""
    kinds = set()
    for module in model.modules():
        weights = (f"{type(w).__name__} {w.dtype} {list(w.shape)}" for w in module.parameters(recurse=False))
        kinds.add((type(module).__qualname__, *weights))
    return sorted(kinds)


@torch.inference_mode()
def measure_passes(engine: Engine, widths: Sequence[int] = WIDTHS) -> PassCosts:
    """Measure an engine's verifications after a text of usual length, in interleaved repeats.

    Args:
        engine: The engine; it must not be in the middle of a generation.
        widths: Numbers of tokens to measure; 1 is among them.
    """
    context = _fitting(engine.model, _CONTEXT, widths)
    cache = _filled_cache(engine, context, widths)
    [seconds] = _seconds_after(engine, cache, [context], widths, {}, _REPEATS)
    return _pass_costs(widths, seconds)


@torch.inference_mode()
def measure_costs(
    engine: Engine,
    *,
    vocabularies: Iterable[int] = (0,),
    most_drafted: int,
    precisions: Iterable[Precision] = ("full",),
) -> CostModel:
    """Measure all that drafting with parts of the model costs, in interleaved repeats.

    Args:
        engine: The engine; it must not be in the middle of a generation. Of the widths at which drafts could be
            verified, those are measured that it chooses.
        vocabularies: Sizes of draft vocabularies; 0 is the whole one.
        most_drafted: Most tokens in a draft.
        precisions: At which drafts may run; ``full`` is always measured. The model makes copies of all its sublayers
            for the others.

    Raises:
        InvalidInputError: The model cannot draft at one of them here.
    """
    lower: list[Precision] = [precision for precision in precisions if precision != "full"]
    measured: list[Precision] = ["full", *lower]
    needed = range(1, most_drafted + 2)
    widths = sorted({1, *(needed if engine.costs is None else map(engine.costs.cheapest_width, needed))})
    model, vocabularies = engine.model, list(vocabularies)
    contexts, prompts = ([_fitting(model, n, widths) for n in lengths] for lengths in (_CONTEXTS, _PROMPTS))
    cache = _filled_cache(engine, max(contexts), widths)
    prefill = _prefill_seconds(engine, cache, prompts)
    stacks = {
        f"{precision} {name}": stack
        for precision in measured
        for name, stack in _sample_stacks(model, vocabularies, precision).items()
    }
    # The graph engine's one cache, with what it holds: its passes then read the buckets that a short text needs.
    engine.new_cache(min(contexts) + max(widths))
    seconds_after = _seconds_after(engine, cache, contexts, widths, stacks, _MODEL_REPEATS)

    def costs_after(context: int, seconds: Mapping[str, float]) -> Costs:
        full, *copies = (_step_costs(model.num_layers, vocabularies, _of(seconds, p)) for p in measured)
        prompt = on_the_line(prefill, prompts, context)
        return Costs(context, full, _pass_costs(widths, seconds), prompt, dict(zip(lower, copies, strict=True)))

    return CostModel(*map(costs_after, contexts, seconds_after))


def _fitting(model: LayerSkipModel, context: int, widths: Sequence[int]) -> int:
    """The length of a text that leaves the model's context room for passes of these widths."""
    return max(min(context, model.context_length - max(widths)), 1)


def _of(seconds: Mapping[str, float], precision: Precision) -> dict[str, float]:
    """Those of the stacks of one precision, by the rest of their names."""
    own = f"{precision} "
    return {name.removeprefix(own): taken for name, taken in seconds.items() if name.startswith(own)}


def _pass_costs(widths: Sequence[int], seconds: Mapping[str, float]) -> PassCosts:
    whole, head = ({width: seconds[f"{part} {width}"] for width in widths} for part in ("verify", "head"))
    return PassCosts.of(whole, head)


def _sample_stacks(model: LayerSkipModel, vocabularies: Sequence[int], precision: Precision) -> dict[str, Stack]:
    """Stacks whose differences tell what the parts cost, as far from the whole model as drafts are, and the head."""
    nothing_skipped = SkipSet(model.num_layers)
    every_second = tuple(range(0, model.num_layers, 2))
    no_mlp = SkipSet(model.num_layers, mlp=every_second)
    bridge = blank_bridge(model)
    no_attention, bridges = SkipSet(model.num_layers, attention=every_second), {2 * n + 1: bridge for n in every_second}
    whole = model.stack_of(nothing_skipped, precision=precision)
    stacks = {
        # As when drafting, the processor's cache has of a step's weights what the step before left there.
        "before": whole,
        "whole": whole,
        "half of attention": model.stack_of(no_attention, precision=precision),
        "half of mlp": model.stack_of(no_mlp, precision=precision),
        "bridged": model.stack_of(no_mlp, stand_ins=bridges, precision=precision),
        "head": model.head_of(precision=precision),
    }
    for size in filter(None, vocabularies):
        token_ids = torch.linspace(0, model.vocab_size - 1, size).long()
        stacks[f"vocabulary {size}"] = model.stack_of(nothing_skipped, token_ids=token_ids, precision=precision)
    return stacks


def _step_costs(num_layers: int, vocabularies: Sequence[int], seconds: Mapping[str, float]) -> StepCosts:
    """From the seconds of the sample stacks, and of the head alone."""
    whole, head = seconds["whole"], seconds["head"]
    half = len(range(0, num_layers, 2))
    attention = (whole - seconds["half of attention"]) / half
    mlp = (whole - seconds["half of mlp"]) / half
    shorter = {size: max(head + seconds[f"vocabulary {size}"] - whole, 0.0) for size in vocabularies if size}
    attention, mlp = max(attention, 0.0), max(mlp, 0.0)
    sublayers, fixed = num_layers * (attention + mlp), whole - num_layers * (attention + mlp) - head
    # The whole is measured directly: where its parts come to more, they are taken for too much.
    scale = 1.0 if fixed >= 0 or not sublayers else max(whole - head, 0.0) / sublayers
    return StepCosts(
        fixed=max(fixed, 0.0),
        attention=scale * attention,
        mlp=scale * mlp,
        bridge=max((seconds["bridged"] - seconds["half of mlp"]) / half, 0.0),
        head=shorter | {0: head},
    )


def _filled_cache(engine: Engine, context: int, widths: Sequence[int]) -> KVCache:
    """A cache with a text of some length, and room for passes after it.

    What a pass costs does not depend on the text, so most of it is its first position over and over.
    """
    model = engine.model
    cache = engine.new_cache(context + max(widths))
    written = min(context, _CONTEXTS[0])
    engine.prefill(torch.zeros(written, dtype=torch.long, device=model.device), cache)
    cache.advance(context - written)
    for part in cache.written():
        part[:, :, written:] = part[:, :, :1]
    return cache


def _prefill_seconds(engine: Engine, cache: KVCache, prompts: Sequence[int]) -> tuple[float, float]:
    """Seconds of running a shorter and a longer prompt; the cache then holds the longer one."""
    tokens = torch.zeros(max(prompts), dtype=torch.long, device=engine.model.device)

    def run(length: int) -> float:
        cache.rollback(0)
        return _seconds(engine.model, lambda: engine.prefill(tokens[:length], cache))

    short, long = (min(run(length) for _ in range(_PREFILL_REPEATS)) for length in prompts)
    return short, long


def _seconds_after(
    engine: Engine,
    cache: KVCache,
    contexts: Sequence[int],
    widths: Sequence[int],
    stacks: Mapping[str, Stack],
    repeats: int,
) -> list[dict[str, float]]:
    """Seconds of draft steps, and of verifications and heads by width, after texts of some lengths.

    Of a stack without steps, its head is run alone.

    All interleaved, so that a machine that is slower for a while is slower for every part and after every text; see
    :func:`comparable_seconds`.

    Args:
        engine: Runs them.
        cache: Was filled with the longest text.
        contexts: The lengths.
        widths: Numbers of tokens to verify.
        stacks: What draft steps run, by name.
        repeats: How often each is run.

    Returns:
        One for each length.
    """
    model = engine.model
    tokens = torch.zeros(max(widths), dtype=torch.long, device=model.device)
    states = model.embed(tokens)

    def step(stack: Stack) -> None:
        engine.draft_step(tokens[:1], cache, stack)

    def score(head: Stack) -> None:
        model.logits(states[:, :1], head)

    def verify(width: int) -> None:
        engine.verify(tokens[:width], cache)

    runs: dict[str, Callable[[], object]] = {
        name: partial(step if stack.steps else score, stack) for name, stack in stacks.items()
    }
    # Plain decoding finds its weights in the processor's cache as its last step left them; where a pass over one token
    # has weights of its own, other passes leave nothing of them there.
    runs["step before"] = partial(verify, 1)
    runs |= {f"verify {width}": partial(verify, width) for width in widths}
    runs |= {f"head {width}": partial(engine.passes.logits, states[:, :width]) for width in widths}

    def seconds_after(context: int, run: Callable[[], object]) -> float:
        cache.rollback(min(context, cache.length))
        cache.advance(context - cache.length)
        return _seconds(model, run)

    rounds: list[list[float]] = []
    with _exact_widths(engine):
        for _ in range(repeats + 1):
            rounds.append([seconds_after(context, run) for context in contexts for run in runs.values()])
    # The first run of a pass is slow: buffers are made, or a graph is captured.
    seconds = iter(comparable_seconds(rounds[1:]))
    return [dict(zip(runs, islice(seconds, len(runs)), strict=True)) for _ in contexts]


def comparable_seconds(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of some runs that were made in turn, several times, such that their ratios can be trusted.

    A machine that others use, too, is slower or faster for moments at a time. If the fastest repeat of each run
    counted, the ratio of two runs would compare moments: measured twice, such ratios differed by 11 % in the mean,
    those of this method by 4 %. So of each run its median share of a round counts, among the faster half of the rounds:
    it is the quiet machine that is asked for, as where decoding is measured.

    Args:
        rounds: The seconds of all runs, for each round.

    Returns:
        One for each run.
    """
    faster = sorted(rounds, key=sum)[: (len(rounds) + 1) // 2]
    totals = [sum(seconds) for seconds in faster]
    mean = statistics.mean(totals)
    by_run = zip(*faster, strict=True)
    return [mean * statistics.median(taken / total for taken, total in zip(own, totals, strict=True)) for own in by_run]


@contextmanager
def _exact_widths(engine: Engine) -> Iterator[None]:
    """Let an engine verify at the width that is needed inside the block, as it does without costs."""
    costs, engine.costs = engine.costs, None
    try:
        yield
    finally:
        engine.costs = costs


def _seconds(model: LayerSkipModel, run: Callable[[], object]) -> float:
    started = device_seconds(model.device)
    run()
    return device_seconds(model.device) - started
