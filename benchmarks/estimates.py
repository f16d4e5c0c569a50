"""Whether predictions can be trusted: predicted against measured speedup of random skip sets, and what each costs.

python -m benchmarks.estimates --json estimates.json
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import optuna
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks.setting import machine_of, write_json
from layerskip import LayerSkipModel, SkipSet, load_checkpoint
from layerskip.drafting.config import DraftConfig
from layerskip.engine import Engine, make_engine
from layerskip.fingerprint import identify
from layerskip.utils import device_seconds
from search.machine_lock import MachineLock
from search.measure import MeasuringPlan, measure_drafters, summarize
from search.prompts import PromptSplit, SearchPrompts, built_in_prompts, split_prompts
from search.search import Search, Tools
from search.search_task import SearchTask
from search.settings import SearchSettings
from search.space import SearchSpace
from studies.storage import open_storage

console = Console(highlight=False, width=150)
# Shares of the sublayers that are left out, one after the other.
_SHARES = (1 / 60, 1 / 30, 1 / 15, 1 / 10, 2 / 15, 1 / 5, 4 / 15, 2 / 5)


@dataclass(frozen=True)
class Compared:
    """One candidate, predicted and measured on the same prompts.

    Args:
        candidate: What it is, human-readable.
        skipped: Sublayers left out.
        acceptance: Estimated one-step acceptance rate.
        simulated: Speedup with the policy that is measured, simulated on the texts that are measured.
        predicted: Speedup as the search predicts it, with a policy chosen on other texts; measured with the best policy
            of these, it is exceeded.
        measured: Speedup.
        estimate_seconds: Time to predict.
        measurement_seconds: Time to measure.
    """

    candidate: str
    skipped: int
    acceptance: float
    simulated: float
    predicted: float
    measured: float
    estimate_seconds: float
    measurement_seconds: float

    @property
    def error(self) -> float:
        """How far the simulation is off, relative to what was measured."""
        return self.simulated / self.measured - 1


@dataclass(frozen=True)
class Workbench:
    """A model with all that predicting and measuring need, on the same prompts."""

    engine: Engine
    space: SearchSpace
    tools: Tools
    plan: MeasuringPlan
    lock: MachineLock


@contextmanager
def prepared(
    model: str, device: str, dtype: str, engine: str, *, prompts: int, max_new_tokens: int, gate: bool = True
) -> Iterator[Workbench]:
    """Load a model and prepare a search of it, whose scored prompts are those that are measured."""
    checkpoint = load_checkpoint(model, device=device, dtype=dtype)
    wrapped = LayerSkipModel(checkpoint.model)
    runner = make_engine(wrapped, engine)
    split = split_prompts(
        built_in_prompts(), checkpoint.tokenizer, max_new_tokens=max_new_tokens, context_length=wrapped.context_length
    )
    settings = SearchSettings(max_new_tokens=max_new_tokens, prompts_per_trial=prompts)
    # Of so many prompts one half is scored and measured; drafts are fitted to the other.
    task_prompts = PromptSplit(split.search[: 2 * prompts], split.held_out)
    space = SearchSpace.of(wrapped, target_confidence=gate)
    with tempfile.TemporaryDirectory() as folder:
        task = SearchTask(identify(wrapped, checkpoint.source), task_prompts, settings, space, folder=Path(folder))
        search = Search(runner, task, open_storage(f"sqlite:///{folder}/studies.db"))
        tools = search.prepare(search.open())
        plan = MeasuringPlan(SearchPrompts.of(task_prompts, settings).measured, max_new_tokens)
        yield Workbench(runner, space, tools, plan, MachineLock(Path(folder), wrapped.device))


def random_candidates(space: SearchSpace, count: int, seed: int) -> list[DraftConfig]:
    """Skip sets of mixed size, at each precision; every second one bridged and with a vocabulary, where there are."""
    source = random.Random(seed)
    made = []
    for number in range(count):
        size = max(round(_SHARES[number % len(_SHARES)] * 2 * space.num_layers), 1)
        skipped = set(source.sample(range(2 * space.num_layers), size))
        skip_set = SkipSet.from_mask([index in skipped for index in range(2 * space.num_layers)])
        group = number // len(_SHARES)
        rich, precision = group % 2 == 1, space.precisions[group % len(space.precisions)]
        vocabulary = space.vocabulary_sizes[len(space.vocabulary_sizes) // 2] if rich else 0
        bridges = rich and space.bridges
        made.append(DraftConfig(skip_set, bridges=bridges, vocabulary_size=vocabulary, precision=precision))
    return made


def compare(bench: Workbench, candidate: DraftConfig) -> Compared:
    """Predict a candidate, then decode the same prompts with it."""
    model, tools = bench.engine.model, bench.tools
    started = device_seconds(model.device)
    prediction = tools.predictor.predict(candidate)
    estimated = device_seconds(model.device)
    drafter = tools.builder.drafter(prediction.simulated.config)
    built = device_seconds(model.device)
    measured = [m["draft"] for m in measure_drafters(bench.engine, {"draft": drafter}, bench.plan, bench.lock)]
    return Compared(
        candidate=str(prediction.simulated.config),
        skipped=len(candidate.skip_set),
        acceptance=prediction.acceptance,
        simulated=prediction.simulated.speedup,
        predicted=prediction.speedup,
        measured=summarize(measured).speedup,
        estimate_seconds=estimated - started,
        measurement_seconds=device_seconds(model.device) - built,
    )


def report(results: Sequence[Compared]) -> dict[str, float]:
    """Print the table; return the figures that sum it up."""
    table = Table("skipped", "α", "simulated", "predicted", "measured", "error", "candidate", box=None)
    for one in results:
        figures = [f"{speedup:.3f}×" for speedup in (one.simulated, one.predicted, one.measured)]
        table.add_row(str(one.skipped), f"{one.acceptance:.2f}", *figures, f"{one.error:+.1%}", one.candidate)
    console.print(table)
    measured = [one.measured for one in results]
    summary = {
        "spearman": float(spearmanr([one.simulated for one in results], measured).statistic),
        "spearman_predicted": float(spearmanr([one.predicted for one in results], measured).statistic),
        "median_absolute_error": statistics.median(abs(r.error) for r in results),
        "median_error": statistics.median(r.error for r in results),
        "median_error_predicted": statistics.median(r.predicted / r.measured - 1 for r in results),
        "measurement_over_estimate": statistics.median(r.measurement_seconds for r in results)
        / statistics.median(r.estimate_seconds for r in results),
    }
    console.print(
        f"{len(results)} skip sets: Spearman {summary['spearman']:.3f} · median error "
        f"{summary['median_absolute_error']:.1%} (bias {summary['median_error']:+.1%}) · with policies chosen on "
        f"other texts {summary['spearman_predicted']:.3f}, bias {summary['median_error_predicted']:+.1%} · a "
        f"measurement takes {summary['measurement_over_estimate']:.0f} times as long as an estimate"
    )
    return summary


def main(
    model: str = "smollm2",
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "auto",
    skip_sets: int = 40,
    prompts: int = 6,
    max_new_tokens: int = 48,
    gate: Annotated[bool, typer.Option(help="Let policies draft nothing where the model is unsure.")] = True,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Compare predicted with measured speedups."""
    with prepared(model, device, dtype, engine, prompts=prompts, max_new_tokens=max_new_tokens, gate=gate) as workbench:
        wrapped = workbench.engine.model
        results = [compare(workbench, candidate) for candidate in random_candidates(workbench.space, skip_sets, seed)]
    summary = report(results)
    figures = [asdict(one) for one in results]
    write_json(json, {"machine": machine_of(wrapped), "model": model, "summary": summary, "figures": figures})


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    typer.run(main)
