"""Passes of randomly initialized models of real shapes against the limit of the card's memory bandwidth (CUDA).

python -m benchmarks.roofline --shape llama-3-8b --json roofline.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig

from benchmarks.setting import machine_of, write_json
from layerskip import LayerSkipModel, SkipSet
from layerskip.attention_masks import needed_attention
from layerskip.engine import EagerEngine, Engine, GraphEngine
from layerskip.sublayers import Stack
from search.bandwidth import bytes_read, measure_read_bandwidth

console = Console(highlight=False)
_REPEATS = 20

SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
    ),
    "gemma-2-9b": lambda: Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        max_position_embeddings=16384,
    ),
}


def random_model(shape: str) -> LayerSkipModel:
    """A model of a shape with random weights in bfloat16, initialized on the device."""
    with torch.device("cuda"):
        config = SHAPES[shape]()
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **needed_attention(config))
    return LayerSkipModel(model.eval())


def seconds_of(run: Callable[[], object]) -> float:
    """Median seconds of a call, the device idle before and after."""
    run()
    seconds = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def draft_stack(model: LayerSkipModel, share: float) -> Stack:
    """A stack that keeps a share of the sublayers, evenly spaced."""
    total = len(model.sublayers)
    kept = {round(i / share) for i in range(round(total * share))}
    return model.stack_of(SkipSet.from_mask([index not in kept for index in range(total)]))


def measure_context(model: LayerSkipModel, engine: Engine, context: int, bandwidth: float) -> dict[str, Any]:
    """The figures of an engine after a text of some length."""
    cache = engine.new_cache(context + 64)
    engine.prefill(torch.zeros(context, dtype=torch.long, device="cuda"), cache)

    def verify(width: int) -> object:
        logits = engine.verify(torch.zeros(width, dtype=torch.long, device="cuda"), cache).logits
        cache.rollback(context)
        return logits

    def draft(stack: Stack) -> object:
        step = engine.draft_step(torch.zeros(1, dtype=torch.long, device="cuda"), cache, stack)
        cache.rollback(context)
        return step

    plain = seconds_of(lambda: verify(1))
    drafts = {}
    for share in (0.25, 0.5, 0.75):
        stack = draft_stack(model, share)
        kept = bytes_read(model, stack) / bytes_read(model, model.target_stack)
        started = time.perf_counter()
        draft(stack)
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        drafts[share] = {
            "kept_bytes": kept,
            "relative_to_kept": seconds_of(lambda stack=stack: draft(stack)) / (plain * kept),  # type: ignore[misc]
            "first_step_seconds": first,
        }
    return {
        "plain_seconds": plain,
        "of_bandwidth": bytes_read(model, model.target_stack) / bandwidth / plain,
        "drafts": drafts,
        "v": {width: seconds_of(lambda width=width: verify(width)) / plain for width in (1, 2, 4, 8, 16, 32)},  # type: ignore[misc]
    }


def host_seconds_of(engine: Engine) -> float:
    """Median seconds that the host needs to start a plain step, without waiting for the device."""
    cache, token = engine.new_cache(64), torch.zeros(1, dtype=torch.long, device="cuda")
    engine.prefill(token, cache)
    seconds = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.verify(token, cache)
        seconds.append(time.perf_counter() - started)
        cache.rollback(1)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama-3-8b",
    contexts: Annotated[list[int] | None, typer.Option(help="Lengths of the text; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Measure a shape with both engines."""
    if not torch.cuda.is_available():
        console.print("needs a CUDA device")
        raise typer.Exit(1)
    with torch.inference_mode():
        bandwidth = measure_read_bandwidth(torch.device("cuda"))
        model = random_model(shape)
        console.print(f"{shape}: the card reads {bandwidth / 1e9:.0f} GB/s")
        result: dict[str, Any] = {"machine": machine_of(model), "shape": shape, "bandwidth": bandwidth, "engines": {}}
        engines: tuple[Engine, ...] = (EagerEngine(model), GraphEngine(model))
        for engine in engines:
            lengths = contexts or (256, 2048, 8192)
            measured: dict[str, Any] = {str(n): measure_context(model, engine, n, bandwidth) for n in lengths}
            measured["host_seconds_a_pass"] = host_seconds_of(engine)
            result["engines"][engine.name] = measured
            console.print(engine.name, measured)
    write_json(json, result)


if __name__ == "__main__":
    typer.run(main)
