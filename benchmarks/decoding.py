"""Decoding methods compared as by ``layerskip compare``, with llama.cpp and each profile at the exact width too.

python -m benchmarks.decoding --profile draft_profile.json --json decoding.json --html decoding.html
"""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from benchmarks.rivals.llama_cpp import llama_cpp_method
from benchmarks.setting import load_setting, machine_of, write_json
from layerskip import DraftProfile
from layerskip.checkpoints import cache_folder, locate
from layerskip.engine import Engine
from search.compare import (
    compare,
    layerskip_methods,
    named_profiles,
    ready_profiles_for,
    transformers_methods,
    usable_methods,
)
from search.decoding_methods import DecodingMethod, layerskip_method
from search.machine_lock import MachineLock
from search.measure import MeasuringPlan, draft_bytes
from search.memory_limit import measure_memory_limit
from studies.comparison import Comparison, advice, described, facts, table
from studies.figures.comparison_figures import comparison_figures
from studies.report import render_page

console = Console(highlight=False, width=170)


def exact_methods(engine: Engine, profiles: dict[str, DraftProfile]) -> list[DecodingMethod]:
    """Each profile, verified without padding to a cheaper width."""
    model, exact = engine.model, copy.copy(engine)
    exact.costs = None  # without costs it pads nothing
    return [
        layerskip_method(
            f"{name}, exact width",
            exact,
            profile.drafter(model),
            draft_bytes=draft_bytes(model, profile.config, profile.weights(model)),
        )
        for name, profile in profiles.items()
    ]


def main(
    model: str = "smollm2",
    profile: Annotated[list[Path] | None, typer.Option(help="A draft profile; may be repeated.")] = None,
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "auto",
    prompts: int = 6,
    max_new_tokens: int = 48,
    repeats: int = 3,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Draw the figures here.")] = None,
) -> None:
    """Compare the decoding methods."""
    transformers_logging.set_verbosity_error()
    setting = load_setting(
        model, device=device, dtype=dtype, prompts=prompts, max_new_tokens=max_new_tokens, engine=engine
    )
    profiles = named_profiles([str(path) for path in profile or []], DraftProfile.load)
    profiles |= ready_profiles_for(setting.model, profiles.values(), device=device, dtype=dtype)
    theirs, left_out = transformers_methods(setting.model, profiles)
    ours = layerskip_methods(setting.engine, profiles, combine=False)
    lock = MachineLock(cache_folder(), setting.model.device)
    memory = measure_memory_limit(setting.model, lock)
    with TemporaryDirectory() as folder:
        longest = max(len(prompt.tokens) for prompt in setting.prompts) + max_new_tokens
        others, not_there = llama_cpp_method(setting.model, Path(locate(model)), Path(folder), longest)
        methods = [*ours, *exact_methods(setting.engine, profiles), *theirs, *others]
        usable, failed = usable_methods(methods, setting.prompts[0])
        entries = compare(
            setting.model,
            usable,
            MeasuringPlan(setting.prompts, max_new_tokens, repeats),
            lock,
            lambda done: console.print(f"{done} of {repeats * len(setting.prompts)} done"),
        )
    machine = machine_of(setting.model)
    comparison = Comparison(
        model=model,
        device=machine["device"],
        dtype=machine["dtype"],
        engine=setting.engine.name,
        versions=machine["versions"],
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        entries=entries,
        left_out=left_out | not_there | failed,
        memory=memory,
    )
    columns, rows = table(comparison)
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for name, value in facts(comparison):
        console.print(f"{name:<9} {value}")
    console.print(advice(comparison))
    write_json(json, machine | described(comparison))
    if html is not None:
        page = render_page(
            f"Ways to decode {model}", advice(comparison), facts(comparison), comparison_figures(comparison)
        )
        html.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
