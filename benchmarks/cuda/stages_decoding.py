"""Stages that decode: captured passes against eager ones, whole rounds at a real shape, and rivals."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.bench import Bench, Passes, new_graph_engine
from benchmarks.cuda.facts import Facts
from benchmarks.cuda.shapes import SHAPES, agreement, random_model
from benchmarks.cuda.stages_passes import evenly_kept, passes_of
from benchmarks.cuda.timing import interleaved, seconds_of, wall_seconds
from layerskip.costs import speedup
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.factory import make_drafter
from layerskip.drafting.stopping import ConfidenceThreshold, FixedLength
from layerskip.engine import EagerEngine, Engine, GraphEngine, compile_sublayers
from layerskip.engine.bandwidth import bytes_read
from layerskip.engine.cuda_graphs import STACKS_KEPT
from layerskip.generation import Generation, generate
from layerskip.model import LayerSkipModel
from layerskip.names import Precision
from layerskip.sampling import Sampling
from layerskip.skip_set import SkipSet

_TINY = "tiny"
_PROMPT = [1, 2, 3, 4]
# In float32.
_NEAR_TIE = 1e-3


def smoke(bench: Bench, facts: Facts) -> None:
    """Captured passes give what eager ones give: drafts, trees, precisions, types, engines, caches that grow."""
    checks: dict[str, Callable[[], object]] = {
        "captured is eager, float32": lambda: _same_texts(bench, torch.float32, SkipSet(4, (1, 2), (2,))),
        "captured is eager, bfloat16": lambda: _same_texts(bench, torch.bfloat16, SkipSet(4, (1, 2), (2,))),
        "captured is eager, tree": lambda: _same_texts(bench, torch.float32, SkipSet(4, (1,)), tree=(3, 2)),
        "captured is eager, int8": lambda: _same_texts(bench, torch.bfloat16, SkipSet(4), precision="int8"),
        "captured is eager, int4": lambda: _same_texts(bench, torch.bfloat16, SkipSet(4), precision="int4"),
        "captured is eager, gemma-2": lambda: _same_texts(bench, torch.float32, SkipSet(4, (1,)), shape="tiny-gemma-2"),
        "cache grows twice": lambda: _grows(bench),
        "more skip sets than are kept, then an old one": lambda: _many_skip_sets(bench, STACKS_KEPT + 4),
        "two engines": lambda: _two_engines(bench),
        "sampled is eager": lambda: _same_texts(
            bench, torch.float32, SkipSet(4, (1,)), sampling=Sampling(temperature=0.8, seed=1)
        ),
    }
    failed = 0
    for name, check in checks.items():
        try:
            facts.add(name, check())
        except Exception as error:  # a fact, as any other; the next check may do
            failed += 1
            facts.add(name, f"error: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
    facts.add("failed checks", failed)
    _leak(bench, facts)


def _small(bench: Bench, dtype: torch.dtype, shape: str = _TINY) -> LayerSkipModel:
    return random_model(SHAPES[shape](), bench.device, dtype)


def _decode(
    model: LayerSkipModel,
    engine: Engine,
    config: DraftConfig | None,
    *,
    max_new_tokens: int = 40,
    sampling: Sampling | None = None,
) -> Generation:
    drafter = None if config is None else make_drafter(model, config)
    return generate(
        model,
        _PROMPT,
        engine=engine,
        drafter=drafter,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        eos_token_ids=(),
    )


def _same_texts(
    bench: Bench,
    dtype: torch.dtype,
    skip_set: SkipSet,
    *,
    precision: Precision = "full",
    tree: tuple[int, ...] = (),
    shape: str = _TINY,
    sampling: Sampling | None = None,
) -> str:
    """Compare texts of both engines.

    Raises:
        AssertionError: They part, in float32.
    """
    model = _small(bench, dtype, shape)
    config = DraftConfig(skip_set, precision=precision, tree=tree, stopping=FixedLength(3))
    engines = EagerEngine(model), new_graph_engine(model)
    eager, captured = (_decode(model, engine, config, sampling=sampling).tokens for engine in engines)
    if eager == captured:
        return "same"
    at = next(i for i, (a, b) in enumerate(zip(eager, captured, strict=True)) if a != b)
    if dtype == torch.float32 and not _is_near_tie(model, [*_PROMPT, *eager[:at]]):
        raise AssertionError(f"texts part after {at} tokens")
    return f"parts after {at} tokens, in {dtype}"


@torch.inference_mode()
def _is_near_tie(model: LayerSkipModel, text: Sequence[int]) -> bool:
    """Whether the two best logits after a text are closer than passes of different width may differ by."""
    tokens = torch.tensor(text, device=model.device)
    logits = model.logits(model.forward(tokens, model.new_cache(len(tokens)))[:, -1:])[0]
    first, second = logits.topk(2).values.tolist()
    return bool(first - second < _NEAR_TIE)


def _same_text(model: LayerSkipModel, ours: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether texts after the usual prompt are the same up to a near-tie."""
    at = next((i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b), None)
    return at is None or _is_near_tie(model, [*_PROMPT, *expected[:at]])


def _grows(bench: Bench) -> str:
    model = _small(bench, torch.float32)
    engine = new_graph_engine(model)
    engine._roomy = lambda: 0  # type: ignore[method-assign]  # so that it has to grow
    for length in (20, 300, 20, 700):
        config = DraftConfig(SkipSet(4, (1,)), stopping=FixedLength(2))
        ours = _decode(model, engine, config, max_new_tokens=length).tokens
        expected = _decode(model, EagerEngine(model), None, max_new_tokens=length).tokens
        assert _same_text(model, ours, expected), f"{length} tokens"
    return "same"


def _many_skip_sets(bench: Bench, count: int) -> str:
    model = _small(bench, torch.float32)
    engine = new_graph_engine(model)
    expected = _decode(model, engine, None).tokens
    for number in (*range(1, count), 1):
        skip_set = SkipSet.from_mask([bool(number >> bit & 1) for bit in range(8)])
        ours = _decode(model, engine, DraftConfig(skip_set, stopping=FixedLength(2))).tokens
        assert _same_text(model, ours, expected), str(skip_set)
    return "same"


def _two_engines(bench: Bench) -> str:
    model = _small(bench, torch.float32)
    first, second = new_graph_engine(model), new_graph_engine(model)
    config = DraftConfig(SkipSet(4, (1,)), stopping=FixedLength(2))
    expected = _decode(model, first, config).tokens
    assert _decode(model, second, config).tokens == expected
    del second
    torch.cuda.empty_cache() if bench.device.type == "cuda" else None
    assert _decode(model, first, config).tokens == expected
    return "same"


@torch.inference_mode()
def _leak(bench: Bench, facts: Facts) -> None:
    """Memory that a captured skip set leaves behind, once as many were captured as are kept."""
    config = SHAPES[bench.shape]()
    config.num_hidden_layers = 4
    model = random_model(config, bench.device, bench.dtype)
    engine = new_graph_engine(model)
    passes, reserved = passes_of(engine, bench), []
    for number in range(STACKS_KEPT + 8 if bench.is_tiny else 200):
        skip_set = SkipSet.from_mask([bool(number >> bit & 1) for bit in range(8)])
        passes.draft(model.stack_of(skip_set))
        reserved.append(torch.cuda.memory_reserved(bench.device) / 2**20 if bench.device.type == "cuda" else 0.0)
    facts.add("captured skip sets", len(reserved))
    first = STACKS_KEPT + 4
    facts.add("memory left behind by a skip set", (reserved[-1] - reserved[first]) / (len(reserved) - 1 - first), "MiB")


@dataclass(frozen=True)
class _Method:
    """A way to decode: the draft, the stopping rule's length for predictions, and how tokens are chosen."""

    config: DraftConfig
    sampling: Sampling | None = None


def _methods(bench: Bench, model: LayerSkipModel, acceptance: float) -> dict[str, _Method]:
    skip_set = bench.redundancy.skip_set(model.num_layers)
    more = bench.redundancy.skip_set(model.num_layers, medium=4)
    methods = {f"skip γ {length}": _Method(DraftConfig(skip_set, stopping=FixedLength(length))) for length in (2, 4, 6)}
    methods["skip more γ 4"] = _Method(DraftConfig(more, stopping=FixedLength(4)))
    methods["skip, confidence"] = _Method(DraftConfig(skip_set, stopping=ConfidenceThreshold(0.5, 8)))
    methods["skip, sampled"] = _Method(
        DraftConfig(skip_set, stopping=FixedLength(4)), Sampling(temperature=0.8, seed=0)
    )
    # Copies of a large model take seconds to make, so they are made once.
    for precision in model.copies.precisions[1:] if acceptance > 0.9 else ():
        nothing = DraftConfig(SkipSet(model.num_layers), precision=precision, stopping=FixedLength(4))
        methods[f"{precision} γ 4"] = _Method(nothing)
        methods[f"{precision} and skip γ 4"] = _Method(replace(nothing, skip_set=skip_set))
        methods[f"{precision} and skip γ 6"] = _Method(replace(nothing, skip_set=skip_set, stopping=FixedLength(6)))
    return {f"planted {acceptance}: {name}": method for name, method in methods.items()}


def decode_planted(bench: Bench, facts: Facts) -> None:
    """Whole rounds on a model of which it is known what it does not need: measured against predicted speedups."""
    for acceptance in (0.95, 0.8):
        model, strength = bench.planted(acceptance)
        facts.add(f"planted {acceptance}: strength of weak sublayers", strength)
        _measure_methods(bench, facts, model, _methods(bench, model, acceptance))


@dataclass(frozen=True)
class _Decoded:
    """A prompt decoded twice by a method: the last generation, and the fewer seconds."""

    generation: Generation
    seconds: float


def _measure_methods(bench: Bench, facts: Facts, model: LayerSkipModel, methods: Mapping[str, _Method]) -> None:
    engine = new_graph_engine(model)
    length = 16 if bench.is_tiny else 96
    drafters = {name: make_drafter(model, method.config) for name, method in methods.items()}

    def decode(name: str, prompt: Sequence[int]) -> Generation:
        sampling = methods[name].sampling if name in methods else None
        return generate(
            model,
            prompt,
            engine=engine,
            drafter=drafters.get(name),
            sampling=sampling,
            max_new_tokens=length,
            eos_token_ids=(),
        )

    names = ["plain", *methods]
    decoded: dict[str, list[_Decoded]] = {name: [] for name in names}
    prompts = [bench.tokens(24 if bench.is_tiny else 128, seed).tolist() for seed in (2, 3)]
    for name in names:  # captures everything
        decode(name, prompts[0])
    for prompt in prompts:
        seconds = dict.fromkeys(names, float("inf"))
        for _ in range(2):
            latest = {}
            for name in names:
                started = time.perf_counter()
                latest[name] = decode(name, prompt)  # ends with a read from the device
                seconds[name] = min(seconds[name], time.perf_counter() - started)
        for name in names:
            decoded[name].append(_Decoded(latest[name], seconds[name]))
    plain = decoded.pop("plain")
    facts.add(f"{names[1].partition(':')[0]}: plain tokens/s", len(prompts) * length / _total(plain), "1/s")
    texts = [
        torch.tensor([*prompt, *one.generation.tokens], device=bench.device)
        for prompt, one in zip(prompts, plain, strict=True)
    ]
    for name, method in methods.items():
        _compare(facts, name, plain, decoded[name])
        if isinstance(method.config.stopping, FixedLength) and method.sampling is None:
            _predict(facts, name, engine, method.config, texts, plain, decoded[name])


def _total(decoded: Iterable[_Decoded]) -> float:
    return sum(each.seconds for each in decoded)


def _compare(facts: Facts, name: str, plain: Sequence[_Decoded], own: Sequence[_Decoded]) -> None:
    stats = [each.generation.stats for each in own]
    rounds, accepted = (sum(getattr(s, what) for s in stats) for what in ("rounds", "accepted"))
    facts.add(f"{name}: speedup", _total(plain) / _total(own))
    facts.add(f"{name}: tokens/s", sum(s.tokens for s in stats) / _total(own), "1/s")
    facts.add(f"{name}: tokens a round", 1 + accepted / max(rounds, 1))
    same = sum(a.generation.tokens == b.generation.tokens for a, b in zip(plain, own, strict=True))
    facts.add(f"{name}: texts as plain", f"{same} of {len(own)}")


@torch.inference_mode()
def _predict(
    facts: Facts,
    name: str,
    engine: GraphEngine,
    config: DraftConfig,
    texts: Sequence[Tensor],
    plain: Sequence[_Decoded],
    own: Sequence[_Decoded],
) -> None:
    """What the measured costs say: with the rounds that there were, and with the rate of acceptance alone."""
    model, length = engine.model, config.stopping.new_state().max_length
    stack = model.stack_of(config.skip_set, precision=config.precision)
    passes = Passes(engine, len(texts[0]) - 32, texts[0])
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: passes.verify(1),
        "verify": lambda: passes.verify(length + 1),
        "draft": lambda: passes.draft(stack),
    }
    seconds = interleaved(runs, model.device)
    stats = [each.generation.stats for each in own]
    prefill = sum(each.generation.stats.prefill_seconds for each in plain)
    drafts, verifications = sum(s.drafted for s in stats), sum(s.rounds for s in stats)
    by_counts = prefill + drafts * seconds["draft"] + verifications * seconds["verify"]
    measured = _total(plain) / _total(own)
    facts.add(f"{name}: measured / predicted by counts", by_counts / _total(own))
    # Where drafts are made: after the prompts.
    starts = [len(text) - len(one.generation.tokens) - 1 for text, one in zip(texts, plain, strict=True)]
    acceptance = statistics.mean(
        agreement(model, config.skip_set, text, config.precision, start=start)
        for text, start in zip(texts, starts, strict=True)
    )
    facts.add(f"{name}: α", acceptance)
    predicted = speedup(acceptance, length, seconds["draft"] / seconds["plain"], seconds["verify"] / seconds["plain"])
    facts.add(f"{name}: measured / predicted by α", measured / predicted)


# Files that have tests for a device.
GPU_TESTS = (
    "engine/test_cuda_graphs",
    "test_model",
    "test_utils_timing",
    "test_generation_host_reads",
    "test_generation_identity",
    "test_fingerprint",
    "drafting/test_quantization",
)


def run_gpu_tests(bench: Bench, facts: Facts) -> None:
    """The tests that need a device; on a CPU they are collected alone."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings="]
    command += ["--timeout", "60", "--continue-on-collection-errors", f"--junitxml={bench.out / 'gpu-tests.xml'}"]
    command += [f"tests/layerskip/{name}.py" for name in GPU_TESTS]
    command += ["--collect-only"] if bench.device.type != "cuda" else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    (bench.out / "gpu-tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    facts.add("exit status", done.returncode)
    facts.add("summary", lines[-1] if lines else done.stderr[-300:])


def time_compiled_sublayers(bench: Bench, facts: Facts) -> None:
    """Captured passes whose sublayers were compiled, against those of fused ones."""
    model = LayerSkipModel(bench.model.hf_model)
    compile_sublayers(model, "inductor" if bench.device.type == "cuda" else "eager")
    compiled = new_graph_engine(model)
    with torch.inference_mode():
        passes, fused = passes_of(compiled, bench), passes_of(bench.engine, bench)
        facts.add("seconds to compile and capture", wall_seconds(lambda: passes.verify(1), bench.device), "s")
        runs: dict[str, Callable[[], object]] = {
            f"{name} v({width})": partial(own.verify, width)
            for name, own in (("fused", fused), ("compiled", passes))
            for width in (1, 5)
        }
        for name, seconds in interleaved(runs, bench.device).items():
            facts.add_seconds(name, seconds)
    counters = torch._dynamo.utils.counters
    facts.add("graph breaks", sum(counters["graph_break"].values()))
    facts.add("frames compiled", counters["stats"].get("unique_graphs", 0))
    facts.add("frames", dict(counters["frames"]))


@torch.inference_mode()
def time_gemma_2(bench: Bench, facts: Facts) -> None:
    """The main figures of Gemma-2: soft-capped attention, four norms a layer, two kinds of windows."""
    bench.__dict__.pop("engine", None)  # room for another large model
    bench.__dict__.pop("model", None)
    bench.__dict__.pop("_planted", None)
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    shape = "tiny-gemma-2" if bench.is_tiny else "gemma-2-9b"
    model = random_model(SHAPES[shape](), bench.device, bench.dtype)
    engine = new_graph_engine(model)
    steps = [type(step).__name__ for _, step in engine.passes.target_stack.steps]
    facts.add("fused sublayers", sum(step.startswith("Fused") for step in steps))
    passes = passes_of(engine, bench)
    stack = model.stack_of(evenly_kept(model.num_layers, 0.5))
    runs: dict[str, Callable[[], object]] = {
        "v(1)": lambda: passes.verify(1),
        "v(5)": lambda: passes.verify(5),
        "c(50% kept)": lambda: passes.draft(stack),
    }
    seconds = interleaved(runs, bench.device)
    facts.add_seconds("captured step", seconds["v(1)"])
    bandwidth = bench.fact("machine", "read bandwidth")
    if bandwidth is not None:
        facts.add("share of bandwidth", bytes_read(model, model.target_stack) / seconds["v(1)"] / (1e9 * bandwidth))
    for name in ("v(5)", "c(50% kept)"):
        facts.add(name, seconds[name] / seconds["v(1)"], "plain steps")
    if bench.device.type == "cuda":
        facts.add("peak memory", torch.cuda.max_memory_allocated(bench.device) / 2**30, "GiB")


def time_rivals(bench: Bench, facts: Facts) -> None:
    """Plain decoding by transformers: as it is, and with a static cache, which it compiles on CUDA."""
    model = bench.model
    length = 8 if bench.is_tiny else 64
    ids = bench.tokens(64)[None]
    hf_model: Any = model.hf_model

    def tokens_per_second(**options: Any) -> float:
        def decode() -> object:
            return hf_model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0, **options)

        return length / seconds_of(decode, bench.device, repeats=2)

    try:
        torch.backends.cuda.enable_cudnn_sdp(True)  # as without layerskip
        facts.add("transformers tokens/s", tokens_per_second(), "1/s")
        facts.add("transformers static tokens/s", tokens_per_second(cache_implementation="static"), "1/s")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
    engine = bench.engine

    def ours() -> object:
        return generate(model, ids, engine=engine, max_new_tokens=length, eos_token_ids=())

    facts.add("ours tokens/s", length / seconds_of(ours, bench.device, repeats=2), "1/s")
