"""Our search against the published ones: the same model, machine, prompts and wall-clock time.

python -m benchmarks.searchers --seconds 300 --json searchers.json

Each searcher's best at some shares of its time is judged afterwards, all in the same way: the held-out prompts decoded
with it, paired with plain decoding, all judged ones interleaved prompt by prompt.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import optuna
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rivals.contest import Incumbent, Searcher, Task
from benchmarks.rivals.decoding_searches import draft_and_verify, tpe
from benchmarks.rivals.knapspec import knapspec
from benchmarks.rivals.ours import ours
from benchmarks.rivals.swift import swift
from benchmarks.setting import machine_of, write_json
from layerskip import LayerSkipModel, load_checkpoint
from layerskip.checkpoints import cache_folder
from layerskip.drafting.drafter import Drafter
from layerskip.engine import make_engine
from layerskip.fingerprint import identify
from search.builder import DraftBuilder, fit_texts
from search.decoding_methods import PLAIN, layerskip_method
from search.machine_lock import MachineLock
from search.measure import MeasuringPlan, Summary, measure_methods, summarize
from search.prompts import EncodedPrompt, SearchPrompts, built_in_prompts, split_prompts
from search.reference import ReferenceRun
from search.settings import SearchSettings
from search.space import SearchSpace

console = Console(highlight=False, width=150)
_SHARES = (0.1, 0.25, 0.5, 1.0)


def _plain_space(model: LayerSkipModel) -> SearchSpace:
    return SearchSpace(model.num_layers)


SEARCHERS: dict[str, Searcher] = {
    "ours": ours("tpe", SearchSpace.of),
    "ours, grey-box": ours("greybox", SearchSpace.of),
    "ours, skip set and exit alone": ours("tpe", _plain_space),
    "TPE, real decoding": tpe,
    "Draft & Verify": draft_and_verify,
    "SWIFT": swift,
    "KnapSpec": knapspec,
}


@dataclass(frozen=True)
class Found:
    """What a searcher had found after a share of its time.

    Args:
        searcher: Its name.
        share: Of the time.
        incumbent: The best it had.
    """

    searcher: str
    share: float
    incumbent: Incumbent


def found_by(name: str, incumbents: Sequence[Incumbent], seconds: float) -> list[Found]:
    """The best at each share of the time; nothing where nothing was found yet."""
    found = []
    for share in _SHARES:
        so_far = [one for one in incumbents if one.seconds <= share * seconds]
        if not so_far and share == 1 and incumbents:  # a single trial took longer than the whole time
            so_far = list(incumbents[:1])
        found += [Found(name, share, so_far[-1])] if so_far else []
    return found


def searched(name: str, task: Task, folder: Path | None) -> list[Incumbent]:
    """What a searcher finds, or had found when it was run before."""
    kept = folder / f"{name}, {task.seconds:.0f} s, seed {task.seed}.json" if folder else None
    if kept and kept.exists():
        return [Incumbent.from_json(values) for values in jsonlib.loads(kept.read_text())]
    incumbents = list(SEARCHERS[name](task))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(jsonlib.dumps([one.as_json() for one in incumbents]))
    return incumbents


def judge(task: Task, folder: Path, found: Sequence[Found], prompts: Sequence[EncodedPrompt]) -> dict[str, Summary]:
    """Measure every different incumbent on the same prompts; by its human-readable name."""
    run = ReferenceRun(task.model, folder, task.fingerprint)
    makers = DraftBuilder(task.model, fit_texts(run, task.prompts.fitted, max_new_tokens=task.max_new_tokens))
    drafters: dict[str, Drafter] = {}
    for one in found:
        if label(one.incumbent) not in drafters:
            drafters[label(one.incumbent)] = makers.drafter(one.incumbent.config)
    methods = [layerskip_method(name, task.engine, drafter) for name, drafter in {PLAIN: None, **drafters}.items()]
    plan = MeasuringPlan(prompts, task.max_new_tokens)
    measured = measure_methods(task.model, methods, plan, MachineLock(folder, task.model.device))
    _, *by_drafter = zip(*measured, strict=True)
    return {name: summarize(measurements) for name, measurements in zip(drafters, by_drafter, strict=True)}


def label(incumbent: Incumbent) -> str:
    """An incumbent, human-readable."""
    return str(incumbent.config)


def report(found: Sequence[Found], judged: dict[str, Summary]) -> None:
    """Print held-out speedups against time."""
    table = Table("searcher", *(f"{share:.0%}" for share in _SHARES), "in the end", box=None)
    for name in dict.fromkeys(one.searcher for one in found):
        by_share = {one.share: one.incumbent for one in found if one.searcher == name}
        cells = [f"{judged[label(by_share[share])].speedup:.3f}×" if share in by_share else "–" for share in _SHARES]
        table.add_row(name, *cells, label(by_share[1.0]) if 1.0 in by_share else "")
    console.print(table)


def main(
    model: str = "smollm2",
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "auto",
    seconds: float = 300,
    max_new_tokens: int = 48,
    prompts: int = 8,
    seed: int = 0,
    only: Annotated[list[str] | None, typer.Option(help="Names of searchers; all without it.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keep what each searcher found here, and take it from there.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Let all searchers search for the same time, one after the other, and judge what they found."""
    checkpoint = load_checkpoint(model, device=device, dtype=dtype)
    wrapped = LayerSkipModel(checkpoint.model)
    split = split_prompts(
        built_in_prompts(), checkpoint.tokenizer, max_new_tokens=100, context_length=wrapped.context_length
    )
    everyone = SearchPrompts.of(split, SearchSettings(max_new_tokens=max_new_tokens))
    fingerprint = identify(wrapped, checkpoint.source).fingerprint
    task = Task(make_engine(wrapped, engine), fingerprint, everyone, max_new_tokens, seconds, seed)
    found: list[Found] = []
    for name in only or SEARCHERS:
        incumbents = searched(name, task, folder)
        console.print(f"{name}:", *(f"{one.seconds:.0f} s {label(one)}" for one in incumbents), sep="\n  ")
        found += found_by(name, incumbents, seconds)
    judged = judge(task, cache_folder(), found, everyone.held_out[:prompts])
    report(found, judged)
    rows = [
        {"searcher": one.searcher, "share": one.share, "found": label(one.incumbent)}
        | asdict(judged[label(one.incumbent)])
        for one in found
    ]
    write_json(json, {"machine": machine_of(wrapped), "model": model, "seconds": seconds, "figures": rows})


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    typer.run(main)
