"""``layerskip report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.common import (
    DEFAULT_STORAGE,
    DebugOption,
    JsonOption,
    StorageOption,
    StudyArgument,
    check_writable,
    print_json,
    stdout,
    write_page,
)


def report(
    study: StudyArgument,
    storage: StorageOption = DEFAULT_STORAGE,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write the report to.")] = Path("report.html"),
    best: Annotated[int, typer.Option(help="Maximum number of candidates in the skip map.", min=1)] = 8,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a study's figures to one HTML file that works offline."""
    from studies.report import render_report, verdict
    from studies.storage import open_existing_storage
    from studies.view import view_study

    check_writable(out)
    view = view_study(open_existing_storage(storage), study)
    write_page(out, render_report(view, best))
    if json:
        print_json({"report": str(out), "study": study})
        return
    stdout.print(verdict(view))
    stdout.print(f"report    {out}")
