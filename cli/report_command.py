"""``layerskip report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_STORAGE, DebugOption, JsonOption, StorageOption, StudyArgument
from cli.output import check_writable, print_json, stdout


def report(
    study: StudyArgument,
    storage: StorageOption = DEFAULT_STORAGE,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the report.")] = Path("report.html"),
    best: Annotated[int, typer.Option(help="Most candidates in the skip map.", min=1)] = 8,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a study's figures to one HTML file that works without a network."""
    from layerskip.errors import InvalidInputError
    from layerskip.utils import write_atomically
    from studies.report import render_report, verdict
    from studies.storage import open_existing_storage
    from studies.view import view_study

    check_writable(out)
    view = view_study(open_existing_storage(storage), study)
    try:
        write_atomically(out, render_report(view, best))
    except OSError as error:
        raise InvalidInputError(f"--out {out}: cannot write the report: {error.strerror}") from error
    if json:
        print_json({"report": str(out), "study": study})
        return
    stdout.print(verdict(view))
    stdout.print(f"report    {out}")
