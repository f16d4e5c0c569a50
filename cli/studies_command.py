"""``layerskip studies``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.common import (
    DEFAULT_STORAGE,
    DebugOption,
    JsonOption,
    StorageOption,
    StudyArgument,
    counted,
    print_json,
    print_untruncated,
    stdout,
)

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(help="List and show studies.", no_args_is_help=True)


@app.command("list")
def list_(storage: StorageOption = DEFAULT_STORAGE, json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the studies in a database."""
    from rich.table import Table

    from studies.storage import open_existing_storage, redacted
    from studies.study import list_studies

    summaries = list_studies(open_existing_storage(storage))
    if json:
        print_json({"studies": [asdict(summary) for summary in summaries]})
        return
    if not summaries:
        stdout.print(f"no studies in {redacted(storage)}; --storage names another database")
        return
    table = Table("study", "model", "candidates", "measured", "best speedup", box=None)
    for summary in summaries:
        best = "" if summary.best_speedup is None else f"{summary.best_speedup:.3f}× {summary.basis}"
        table.add_row(summary.name, summary.model or "?", str(summary.evaluated), str(summary.measured), best)
    print_untruncated(table)


@app.command("show")
def show(
    study: StudyArgument,
    storage: StorageOption = DEFAULT_STORAGE,
    best: Annotated[int, typer.Option(help="Number of best trials to show.", min=1)] = 10,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a study's best candidates: finalists by their speedup on held-out prompts, then measured, then predicted.

    Others that were given up, after some texts or some prompts, come last: what they did on these says little.
    Predictions are corrected by what measured candidates showed.
    """
    from studies.storage import open_existing_storage
    from studies.study import describe_study, describe_trials

    described = describe_study(open_existing_storage(storage), study, best)
    if json:
        print_json(described)
        return
    context = described["context"]
    stdout.print(f"study     {study}")
    if context:
        stdout.print(f"model     {context['model']} ({context['dtype']} on {context['device']})")
        stdout.print(
            f"prompts   {context['prompts_per_trial']} per measurement, "
            f"at most {counted(context['max_new_tokens'], 'token')} each"
        )
    states = described["trials"]
    if context:
        trials = describe_trials(described["evaluated"], described["measured"], states, described["measurements"])
    else:
        trials = ", ".join(f"{count} {state}" for state, count in states.items()) or "none"
    stdout.print(f"trials    {trials}")
    print_untruncated(_table(described["best"]))


def _table(trials: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("trial", "speedup", "basis", "held-out", "one-step acceptance", "skipped", "draft", box=None)
    for trial in trials:
        table.add_row(
            str(trial["number"]),
            f"{trial['speedup']:.3f}×",
            trial["basis"] + ", given up" * trial["given_up"],
            "" if trial["held_out_speedup"] is None else f"{trial['held_out_speedup']:.3f}×",
            "" if trial["acceptance"] is None else f"{trial['acceptance']:.0%}",
            str(trial["skip_set"]),
            str(trial["draft"]),
        )
    return table
