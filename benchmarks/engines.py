"""Plain decoding by transformers and by each engine, and the cost of passes by width.

python -m benchmarks.engines --model smollm2 --dtype float32
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks.setting import machine_of, write_json
from layerskip import LayerSkipModel, generate, load_checkpoint
from layerskip.engine import EagerEngine, Engine, PackedEngine

console = Console(highlight=False, width=140)

WIDTHS = (1, 2, 4, 5, 8, 16, 128)
_CONTEXT = 64


def fastest(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of the fastest repeat of each, interleaved: disturbance only adds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], 1000 * (time.perf_counter() - started))
    return best


def transformers_plain(model: LayerSkipModel, prompt: torch.Tensor, length: int) -> None:
    """Greedy decoding by the model's own ``generate``."""
    hf_model: Any = model.hf_model
    settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    hf_model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **settings)


@torch.inference_mode()
def pass_milliseconds(engines: Mapping[str, Engine], repeats: int) -> dict[int, dict[str, float]]:
    """Milliseconds of a pass after a short text, by width and engine."""
    tokens = torch.arange(_CONTEXT + max(WIDTHS))
    caches = {name: engine.new_cache(len(tokens)) for name, engine in engines.items()}
    for name, engine in engines.items():
        engine.prefill(tokens[:_CONTEXT], caches[name])

    def run(name: str, width: int) -> None:
        engines[name].verify(tokens[:width], caches[name])
        caches[name].rollback(_CONTEXT)

    return {width: fastest({name: partial(run, name, width) for name in engines}, repeats) for width in WIDTHS}


def main(
    model: str = "smollm2",
    dtype: str = "float32",
    max_new_tokens: int = 16,
    repeats: int = 8,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Compare the engines on a CPU."""
    transformers_logging.set_verbosity_error()
    checkpoint = load_checkpoint(model, device="cpu", dtype=dtype)
    wrapped = LayerSkipModel(checkpoint.model)
    prompt = torch.tensor(checkpoint.tokenizer.encode("Tell me a story about a fox and a hen, please."))
    engines: dict[str, Engine] = {"eager": EagerEngine(wrapped), "packed": PackedEngine(wrapped)}
    runs: dict[str, Callable[[], object]] = {
        name: partial(generate, wrapped, prompt, engine=engine, max_new_tokens=max_new_tokens, eos_token_ids=())
        for name, engine in engines.items()
    }
    runs["transformers"] = partial(transformers_plain, wrapped, prompt, max_new_tokens)
    plain = {name: spent / max_new_tokens for name, spent in fastest(runs, repeats).items()}
    passes = pass_milliseconds(engines, repeats)
    for name, spent in plain.items():
        console.print(f"plain, {name:12} {spent:7.2f} ms a token, {plain['transformers'] / spent:.2f}x of transformers")
    for width, by_engine in passes.items():
        console.print(
            f"pass of {width:3} tokens: " + " · ".join(f"{name} {ms:.2f} ms" for name, ms in by_engine.items())
        )
    write_json(json, machine_of(wrapped) | {"model": model, "plain_ms": plain, "pass_ms": passes})


if __name__ == "__main__":
    typer.run(main)
