"""``layerskip studies``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_STORAGE, DebugOption, JsonOption, StorageOption, StudyArgument
from cli.output import counted, print_json, print_untruncated, stdout

if TYPE_CHECKING:
    from rich.table import Table

_STATES = {"complete": "completed", "waiting": "queued", "fail": "failed or interrupted"}

app = typer.Typer(help="Look at the studies of a storage.", no_args_is_help=True)


@app.command("list")
def list_(storage: StorageOption = DEFAULT_STORAGE, json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the studies of a storage."""
    from rich.table import Table

    from studies.storage import open_existing_storage
    from studies.study import list_studies

    summaries = list_studies(open_existing_storage(storage))
    if json:
        print_json({"studies": [asdict(summary) for summary in summaries]})
        return
    if not summaries:
        stdout.print("no studies yet")
        return
    table = Table("study", "model", "candidates", "measured", "best speedup", box=None)
    for summary in summaries:
        best = "" if summary.best_speedup is None else f"{summary.best_speedup:.3f}× {summary.basis}"
        table.add_row(summary.name, summary.model or "?", str(summary.seen), str(summary.measured), best)
    print_untruncated(table)


@app.command("show")
def show(
    study: StudyArgument,
    storage: StorageOption = DEFAULT_STORAGE,
    best: Annotated[int, typer.Option(help="Number of best trials to show.", min=1)] = 10,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a study's best candidates, by the speedup that was measured, or else predicted, on the search's prompts.

    Predictions are ranked as far as they proved right where candidates were measured. What finalists measured on
    held-out prompts stands beside it.
    """
    from studies.storage import open_existing_storage
    from studies.study import describe_study

    described = describe_study(open_existing_storage(storage), study, best)
    if json:
        print_json(described)
        return
    context = described["context"]
    stdout.print(f"study     {study}")
    if context:
        stdout.print(f"model     {context['model']} ({context['dtype']} on {context['device']})")
        stdout.print(
            f"prompts   {context['prompts_per_trial']} a measurement, "
            f"at most {counted(context['max_new_tokens'], 'token')} each"
        )
    counts = ", ".join(f"{count} {_STATES.get(state, state)}" for state, count in described["trials"].items())
    stdout.print(f"trials    {counts or 'none'}; {counted(described['measurements'], 'prompt')} measured")
    stdout.print(_table(described["best"]))


def _table(trials: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("trial", "speedup", "basis", "held-out", "agreement", "skipped", "draft", box=None)
    for trial in trials:
        agreement = "" if trial["acceptance"] is None else f"{trial['acceptance']:.0%}"
        final = "" if trial["held_out_speedup"] is None else f"{trial['held_out_speedup']:.3f}×"
        what = (str(trial["skip_set"]), str(trial["draft"]))
        table.add_row(str(trial["number"]), f"{trial['speedup']:.3f}×", trial["basis"], final, agreement, *what)
    return table
