"""Tokens per second of every way to decode, on one model and the same held-out prompts, interleaved in one run.

python -m benchmarks.decoding --profile draft_profile.json --json decoding.json --html decoding.html
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import plotly.graph_objects as go
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from benchmarks.contenders import Contender, Run, assistant_of, ours, transformers_mode
from benchmarks.memory import peak_memory
from benchmarks.setting import Setting, load_setting, machine_of, write_json
from layerskip import DraftProfile, LayerSkipModel
from layerskip.errors import LosslessnessError
from layerskip.timing import device_seconds
from search.measure import parts_at_near_tie
from search.prompts import EncodedPrompt

console = Console(highlight=False, width=150)


@dataclass(frozen=True)
class Figures:
    """What a contender did over all prompts; rates are medians over the repeats, with the lowest and the highest."""

    name: str
    tokens_per_second: float
    lowest: float
    highest: float
    speedup: float
    acceptance_rate: float | None
    full_passes: int
    draft_passes: int
    peak_bytes: int | None
    near_ties: int
    different: int


def contenders_of(setting: Setting, profiles: Sequence[Path]) -> list[Contender]:
    """Everybody who takes part; the first is what the others are compared with."""
    model, hf_model = setting.model, setting.model.hf_model
    loaded = {path.stem: DraftProfile.load(path) for path in profiles}
    taking_part = [transformers_mode("transformers plain", hf_model)]
    if model.device.type == "cuda":
        taking_part.append(transformers_mode("transformers static + compile", hf_model, cache_implementation="static"))
    taking_part += [
        transformers_mode("transformers prompt lookup", hf_model, prompt_lookup_num_tokens=10),
        transformers_mode("transformers early exit", hf_model, assistant_early_exit=model.num_layers // 2),
    ]
    if loaded:
        name, profile = next(iter(loaded.items()))
        assistant = assistant_of(hf_model, profile.skip_set)
        taking_part.append(transformers_mode(f"transformers assistant ({name})", hf_model, assistant_model=assistant))
    taking_part.append(ours("layerskip plain", model, None))
    exact = LayerSkipModel(hf_model)  # not calibrated, so that it verifies no more tokens than it must
    for name, profile in loaded.items():
        taking_part.append(ours(f"layerskip profile {name}", model, profile.drafter(model)))
        taking_part.append(ours(f"layerskip profile {name}, exact width", exact, profile.drafter(exact)))
    return taking_part


def measure(
    setting: Setting, contenders: Sequence[Contender], *, max_new_tokens: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[Run]], dict[str, int | None]]:
    """Decode every prompt with every contender in turn, ``repeats`` times after a warm-up.

    Returns:
        Tokens per second of each repeat, the runs of the last repeat and the highest peak memory, by contender.
    """
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    runs: dict[str, list[Run]] = {}
    peaks: dict[str, int | None] = {}
    for contender in contenders:
        with peak_memory(setting.model.device) as peak:
            contender.decode(setting.prompts[0].tokens, max_new_tokens)
        peaks[contender.name] = peak.bytes
    for repeat in range(repeats):
        seconds = dict.fromkeys(rates, 0.0)
        runs = {name: [] for name in rates}
        for number, prompt in enumerate(setting.prompts):
            shift = (repeat + number) % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                started = device_seconds(setting.model.device)
                runs[contender.name].append(contender.decode(prompt.tokens, max_new_tokens))
                seconds[contender.name] += device_seconds(setting.model.device) - started
        for name in rates:
            rates[name].append(sum(len(run.tokens) for run in runs[name]) / seconds[name])
        console.print(f"repeat {repeat + 1} of {repeats} done")
    return rates, runs, peaks


def figures_of(
    setting: Setting, name: str, rates: dict[str, list[float]], runs: dict[str, list[Run]], peak: int | None
) -> Figures:
    """The figures of one contender; speedup is against the first, repeat by repeat."""
    first = next(iter(rates))
    drafted = sum(run.drafted for run in runs[name])
    ties = [
        _parts(setting, prompt, *pair) for prompt, *pair in zip(setting.prompts, runs[first], runs[name], strict=True)
    ]
    return Figures(
        name=name,
        tokens_per_second=statistics.median(rates[name]),
        lowest=min(rates[name]),
        highest=max(rates[name]),
        speedup=statistics.median(own / other for own, other in zip(rates[name], rates[first], strict=True)),
        acceptance_rate=sum(run.accepted for run in runs[name]) / drafted if drafted else None,
        full_passes=sum(run.full_passes for run in runs[name]),
        draft_passes=sum(run.draft_passes for run in runs[name]),
        peak_bytes=peak,
        near_ties=ties.count("near-tie"),
        different=ties.count("different"),
    )


def _parts(setting: Setting, prompt: EncodedPrompt, expected: Run, got: Run) -> str:
    """Whether an output is that of the first contender."""
    try:
        tie = parts_at_near_tie(setting.model, prompt, expected.tokens, got.tokens)
    except LosslessnessError:
        return "different"
    return "near-tie" if tie else "same"


def print_table(figures: Sequence[Figures]) -> None:
    """The comparison, for people."""
    table = Table("", "tokens/s", "range", "speedup", "accepted", "full passes", "draft passes", "peak MB", "output")
    for one in figures:
        output = (
            f"{one.different} differ" if one.different else f"{one.near_ties} near-ties" if one.near_ties else "same"
        )
        table.add_row(
            one.name,
            f"{one.tokens_per_second:.1f}",
            f"{one.lowest:.1f}–{one.highest:.1f}",
            f"{one.speedup:.2f}×",
            "" if one.acceptance_rate is None else f"{one.acceptance_rate:.0%}",
            str(one.full_passes),
            str(one.draft_passes or ""),
            "?" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:.0f}",
            output,
        )
    console.print(table)


def draw(path: Path, figures: Sequence[Figures], title: str) -> None:
    """The comparison as bars, in an HTML file that needs no network."""
    bars = go.Bar(
        x=[one.tokens_per_second for one in figures],
        y=[one.name for one in figures],
        orientation="h",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [one.highest - one.tokens_per_second for one in figures],
            "arrayminus": [one.tokens_per_second - one.lowest for one in figures],
        },
        text=[f"{one.speedup:.2f}×" for one in figures],
    )
    figure = go.Figure(bars, layout={"title": title, "xaxis_title": "tokens/s", "yaxis": {"autorange": "reversed"}})
    figure.write_html(path, include_plotlyjs=True)


def main(
    model: str = "smollm2",
    profile: Annotated[list[Path] | None, typer.Option(help="A draft profile; may be repeated.")] = None,
    device: str = "auto",
    dtype: str = "auto",
    prompts: int = 6,
    max_new_tokens: int = 48,
    repeats: int = 3,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Draw the figures here.")] = None,
) -> None:
    """Compare every way to decode."""
    transformers_logging.set_verbosity_error()
    setting = load_setting(model, device=device, dtype=dtype, prompts=prompts, max_new_tokens=max_new_tokens)
    contenders = contenders_of(setting, profile or [])
    with torch.inference_mode():
        rates, runs, peaks = measure(setting, contenders, max_new_tokens=max_new_tokens, repeats=repeats)
    figures = [figures_of(setting, name, rates, runs, peaks[name]) for name in rates]
    print_table(figures)
    machine = machine_of(setting.model)
    result: dict[str, Any] = {"machine": machine, "model": model, "figures": [asdict(one) for one in figures]}
    write_json(json, result)
    if html is not None:
        draw(html, figures, f"{model}, {machine['dtype']}, {machine['device']}")


if __name__ == "__main__":
    typer.run(main)
