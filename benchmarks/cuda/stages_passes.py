"""Stages that time passes: the machine's floor, plain steps, verifications and draft steps, kernels, and host time."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import transformers
from torch.nn import functional

from benchmarks.cuda.bench import Bench, Passes, new_graph_engine
from benchmarks.cuda.facts import Facts
from benchmarks.cuda.timing import host_seconds, interleaved, seconds_of, timed, wall_seconds
from layerskip.drafting.config import DraftConfig, PromptLookup
from layerskip.drafting.factory import make_drafter
from layerskip.drafting.quantized_linear import Int4Linear, Int8Linear
from layerskip.drafting.stopping import ConfidenceThreshold, FixedLength
from layerskip.engine import EagerEngine, Engine
from layerskip.engine.bandwidth import bytes_read, measure_read_bandwidth
from layerskip.errors import LayerSkipError
from layerskip.generation import generate
from layerskip.model import LayerSkipModel
from layerskip.names import Precision
from layerskip.sampling import Sampling
from layerskip.skip_set import SkipSet
from layerskip.sublayers import Stack

# Kernels that take less are launches rather than work.
_TINY_KERNEL_US = 4.0


def read_facts_of_machine(bench: Bench, facts: Facts) -> None:
    """Versions, bandwidth, and the matrix products that a pass is made of: the floor of everything else."""
    facts.add("torch", torch.__version__)
    facts.add("transformers", transformers.__version__)
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        facts.add("device", properties.name)
        facts.add("memory", properties.total_memory / 2**30, "GiB")
        facts.add("cuda", torch.version.cuda)
        facts.add("cudnn", torch.backends.cudnn.version())
    facts.add("read bandwidth", measure_read_bandwidth(bench.device, 2**26 if bench.is_tiny else 2**31) / 1e9, "GB/s")
    source = torch.ones(2 ** (24 if bench.is_tiny else 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copied = seconds_of(lambda: target.copy_(source), bench.device)
    facts.add("copy bandwidth", 2 * source.nbytes / copied / 1e9, "GB/s")
    hidden, inner = (256, 512) if bench.is_tiny else (4096, 14336)
    shapes = {"qkv": (hidden * 3 // 2, hidden), "o": (hidden, hidden), "gate up": (2 * inner, hidden)}
    shapes |= {"down": (hidden, inner), "head": (1024 if bench.is_tiny else 128256, hidden)}
    for name, (rows, columns) in shapes.items():
        _time_products(bench, facts, name, rows, columns)


@torch.inference_mode()
def _time_products(bench: Bench, facts: Facts, name: str, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, dtype=bench.dtype, device=bench.device)
    kernels: dict[str, Callable[[Any], object]] = {"bf16": lambda x: functional.linear(x, weight)}
    for kind in (Int8Linear, Int4Linear):
        try:
            linear = kind(weight, None, bench.dtype)
            linear(weight[:1])
            kernels[kind.__name__.removesuffix("Linear").lower()] = linear
        except RuntimeError as error:
            facts.add(f"{name} {kind.__name__}", f"error: {str(error).splitlines()[0]}")
    inputs = {m: torch.randn(m, columns, dtype=bench.dtype, device=bench.device) for m in (1, 2, 4, 5, 8, 16)}
    runs = {f"{name} {k} {m} rows": partial(run, inputs[m]) for (k, run), m in product(kernels.items(), inputs)}
    for run, seconds in interleaved(runs, bench.device).items():
        facts.add(run, 1e6 * seconds, "us")


@torch.inference_mode()
def time_plain_steps(bench: Bench, facts: Facts) -> None:
    """A plain step, captured and eager, against the card's bandwidth."""
    model, tokens = bench.model, bench.tokens(4096)
    engine = bench.engine
    facts.add(
        "fused sublayers", sum(type(step).__name__.startswith("Fused") for _, step in engine.passes.target_stack.steps)
    )
    passes = Passes(engine, bench.context, tokens)
    facts.add("seconds to capture", wall_seconds(lambda: passes.verify(1), bench.device), "s")
    plain = seconds_of(lambda: passes.verify(1), bench.device, repeats=20)
    facts.add_seconds("captured step", plain)
    facts.add("captured tokens/s", 1 / plain, "1/s")
    bandwidth = bench.fact("machine", "read bandwidth")
    if bandwidth is not None:
        share = bytes_read(model, model.target_stack) / plain / (1e9 * bandwidth)
        facts.add("share of bandwidth", share)
    eager = EagerEngine(model)
    known = Passes(eager, bench.context, tokens)
    facts.add_seconds("eager step", seconds_of(lambda: known.verify(1), bench.device))
    if bench.device.type != "cuda":
        return
    try:
        for cudnn in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            fresh = Passes(eager, bench.context, tokens)
            lengths = [timed(partial(eager.verify, tokens[:1], fresh.cache), bench.device) for _ in range(12)]
            facts.add_seconds(f"eager step at a new length, cuDNN {'on' if cudnn else 'off'}", sorted(lengths)[6])
        with_cudnn = Passes(new_graph_engine(model), bench.context, tokens)
        facts.add_seconds("captured step, cuDNN on", seconds_of(lambda: with_cudnn.verify(1), bench.device))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def evenly_kept(num_layers: int, share: float) -> SkipSet:
    """The skip set that keeps a share of the sublayers, evenly spaced."""
    kept = {round(i / share) for i in range(round(2 * num_layers * share))}
    return SkipSet.from_mask([index not in kept for index in range(2 * num_layers)])


def draft_stacks(bench: Bench, model: LayerSkipModel) -> dict[str, Stack]:
    """Drafts by name: shares of the sublayers, a shorter head, and lower precision."""
    layers = model.num_layers
    stacks = {f"{share:.0%} kept": model.stack_of(evenly_kept(layers, share)) for share in (0.25, 0.5, 0.75)}
    ids = torch.arange(256 if bench.is_tiny else 16384)
    stacks["50% kept, shorter head"] = model.stack_of(evenly_kept(layers, 0.5), token_ids=ids)
    lower: tuple[Precision, ...] = ("int8", "int4")
    for precision in lower:
        try:
            stacks[precision] = model.stack_of(SkipSet(layers), precision=precision)
            stacks[f"{precision}, 50% kept"] = model.stack_of(evenly_kept(layers, 0.5), precision=precision)
        except LayerSkipError as error:  # no kernel here: a fact, too
            warnings.warn(str(error), stacklevel=2)
    return stacks


@torch.inference_mode()
def time_verifications_and_drafts(bench: Bench, facts: Facts) -> None:
    """The costs v and c, in plain steps, after texts of several lengths."""
    model, engine = bench.model, bench.engine
    stacks = draft_stacks(bench, model)
    facts.add("memory of copies", model.copies.nbytes / 2**20, "MiB")
    lengths = (64, 128, 256) if bench.is_tiny else (bench.context, 2000, 8000)
    for name, context in zip(("short", "longer", "long"), lengths, strict=True):
        text = f"after a {name} text"
        passes = Passes(engine, context, bench.tokens(8192))
        runs: dict[str, Callable[[], object]] = {
            f"v({width})": partial(passes.verify, width) for width in (1, 2, 3, 5, 8, 16, 24)
        }
        runs |= {f"c({name})": partial(passes.draft, stack) for name, stack in stacks.items()}
        seconds = interleaved(runs, bench.device)
        plain = seconds["v(1)"]
        facts.add(f"tokens of a {name} text", context)
        facts.add_seconds(f"plain step {text}", plain)
        for run, taken in seconds.items():
            facts.add(f"{run} {text}", taken / plain, "plain steps")


@torch.inference_mode()
def profile_kernels(bench: Bench, facts: Facts) -> None:
    """Which kernels a plain step and a draft step are made of, how many, and how long they take."""
    passes = Passes(bench.engine, bench.context, bench.tokens(4096))
    stack = bench.model.stack_of(evenly_kept(bench.model.num_layers, 0.5))
    on_cuda = bench.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU]
    steps: dict[str, Callable[[], object]] = {"plain": lambda: passes.verify(1), "draft": lambda: passes.draft(stack)}
    for name, step in steps.items():
        step()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(3):
                step()
            if on_cuda:
                torch.cuda.synchronize()
        micros, counts = Counter[str](), Counter[str]()
        for event in profiler.events():
            if on_cuda and "CUDA" not in str(event.device_type):  # calls that started kernels
                continue
            taken = event.device_time if on_cuda else event.self_cpu_time_total
            micros[event.name] += taken / 3
            counts[event.name] += 1
        tiny = sum(us for kernel, us in micros.items() if 3 * us / counts[kernel] < _TINY_KERNEL_US)
        facts.add(f"{name}: kernels", sum(counts.values()) / 3)
        facts.add(f"{name}: kernel time", sum(micros.values()), "us")
        facts.add(f"{name}: share of tiny kernels", tiny / max(sum(micros.values()), 1e-9))
        for kernel, us in micros.most_common(12):
            facts.add(f"{name}: {kernel[:90]}", {"us": round(us, 1), "count": counts[kernel] / 3})


def count_waits(bench: Bench, facts: Facts) -> None:
    """How often the host waits for the device in a round, and how long it takes to start a step."""
    model, engine = bench.model, bench.engine
    skip_set = bench.redundancy.skip_set(model.num_layers)
    rounds = {
        "plain": (None, None),
        "fixed length": (DraftConfig(skip_set, stopping=FixedLength(4)), None),
        "confidence": (DraftConfig(skip_set, stopping=ConfidenceThreshold(0.5, 8)), None),
        "prompt lookup": (DraftConfig(skip_set, stopping=FixedLength(4), prompt_lookup=PromptLookup(1, 8)), None),
        "tree": (DraftConfig(skip_set, stopping=FixedLength(4), tree=(3, 2)), None),
        "sampled": (DraftConfig(skip_set, stopping=FixedLength(4)), Sampling(temperature=0.8, seed=0)),
    }
    prompt = bench.tokens(32).tolist()
    for name, (config, sampling) in rounds.items():
        drafter = None if config is None else make_drafter(model, config)
        decode = partial(
            generate,
            model,
            prompt,
            engine=engine,
            drafter=drafter,
            sampling=sampling,
            max_new_tokens=24,
            eos_token_ids=(),
        )
        decode()
        waits, stats = _waits_of(decode, bench)
        of_prompt, _ = _waits_of(partial(decode, max_new_tokens=1), bench)
        facts.add(f"{name}: waits a round", (waits - of_prompt) / max(stats.rounds, 1))
        if config is not None and config.stopping.new_state().max_length > 4:
            facts.add(f"{name}: draft steps a round", stats.drafted / max(stats.rounds, 1))
    with torch.inference_mode():
        passes = Passes(engine, 32, bench.tokens(4096))
        stack = model.stack_of(skip_set)
        facts.add("host time to start a plain step", 1e6 * host_seconds(lambda: passes.verify(1), bench.device), "us")
        facts.add(
            "host time to start a draft step", 1e6 * host_seconds(lambda: passes.draft(stack), bench.device), "us"
        )


def _waits_of(decode: Callable[[], Any], bench: Bench) -> tuple[int, Any]:
    if bench.device.type != "cuda":
        return 0, decode().stats
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stats = decode().stats
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught), stats


def passes_of(engine: Engine, bench: Bench) -> Passes:
    """The passes of an engine after the usual text."""
    return Passes(engine, bench.context, bench.tokens(4096))
