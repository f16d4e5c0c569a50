"""What the target-confidence gate brings: random skip sets with their best policy, with a gate and without.

python -m benchmarks.gate
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import optuna
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.estimates import Workbench, prepared, random_candidates
from benchmarks.setting import machine_of, write_json
from search.measure import PromptMeasurement, measure_prompt, summarize, warm_up
from search.predict import SpeedupPredictor
from search.space import Candidate

console = Console(highlight=False, width=150)


def compare(bench: Workbench, candidate: Candidate, max_new_tokens: int) -> dict[str, float | str]:
    """Speedups of a candidate with the best policy of all, and with the best that has no gate, interleaved."""
    spaces = {"gate": bench.space, "no gate": replace(bench.space, gates=(0.0,))}
    tools = bench.tools
    row: dict[str, float | str] = {"candidate": str(candidate)}
    drafters = {}
    for name, space in spaces.items():
        predictor = SpeedupPredictor(
            bench.engine, space, tools.makers, tools.estimator, tools.latency, max_new_tokens=max_new_tokens
        )
        prediction = predictor.estimate(candidate).prediction
        row[f"policy, {name}"], row[f"predicted, {name}"] = str(prediction.policy), prediction.speedup
        drafters[name] = tools.makers.drafter(candidate, prediction.policy)
        warm_up(bench.engine, drafters[name], bench.prompts, max_new_tokens=max_new_tokens)
    measured: dict[str, list[PromptMeasurement]] = {name: [] for name in drafters}
    for number, prompt in enumerate(bench.prompts):
        for name, drafter in drafters.items():
            plain_first = number % 2 == 0
            one = measure_prompt(bench.engine, prompt, drafter, max_new_tokens=max_new_tokens, plain_first=plain_first)
            measured[name].append(one)
    return row | {f"measured, {name}": summarize(each).speedup for name, each in measured.items()}


def main(
    model: str = "smollm2",
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "eager",
    skip_sets: int = 16,
    prompts: int = 4,
    max_new_tokens: int = 32,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Compare policies with a gate and without."""
    with prepared(model, device, dtype, engine, prompts=prompts, max_new_tokens=max_new_tokens) as bench:
        rows = [compare(bench, one, max_new_tokens) for one in random_candidates(bench.space, skip_sets, seed)]
        machine = machine_of(bench.model)
    columns = ("predicted, no gate", "predicted, gate", "measured, no gate", "measured, gate")
    table = Table(*columns, "candidate", box=None)
    for row in rows:
        table.add_row(*(f"{row[column]:.3f}×" for column in columns), str(row["candidate"]))
    console.print(table)
    for how in ("predicted", "measured"):
        gains = [float(row[f"{how}, gate"]) / float(row[f"{how}, no gate"]) for row in rows]
        console.print(f"{how}: a gate brings a factor of {statistics.median(gains):.3f} in the median of {len(gains)}")
    write_json(json, {"machine": machine, "model": model, "figures": rows})


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    typer.run(main)
