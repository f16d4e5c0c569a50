"""The ``layerskip`` command. Its subcommands parse, call and print; torch is imported only by those that need it."""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import version
from typing import Annotated

import typer

from cli import (
    apply_command,
    bench_command,
    compare_command,
    dashboard_command,
    doctor_command,
    export_command,
    profile_command,
    report_command,
    search_command,
    studies_command,
    tune_command,
)
from cli.common import DEBUG, DONE, FAILED, INTERRUPTED, WRONG_USAGE, escape_unencodable
from layerskip.errors import InvalidInputError, LayerSkipError, first_line, out_of_memory
from layerskip.notices import silence_notices

# Characters of an error; users may give values of any length, which errors repeat.
_LONGEST = 900

_WHAT_TO_GIVE = {
    "model": "give a Hub id, a folder, a .gguf file, or smollm2 to try it on a small model",
    "profile": "give the file or folder of a draft profile, or a ready one, such as smollm2",
    "study": "give its name; 'layerskip studies list' has the names",
}

app = typer.Typer(
    name="layerskip",
    help="Speculative decoding with a model's own sublayers: search for a draft, decode faster, with unchanged output.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("search")(search_command.search)
app.command("tune")(tune_command.tune)
app.command("apply")(apply_command.apply)
app.command("export")(export_command.export)
app.command("bench")(bench_command.bench)
app.command("compare")(compare_command.compare)
app.add_typer(profile_command.app, name="profile")
app.add_typer(studies_command.app, name="studies")
app.command("report")(report_command.report)
app.command("dashboard")(dashboard_command.dashboard)
app.command("doctor")(doctor_command.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layerskip {version('layerskip')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    escape_unencodable()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress bars would fill a log
    silence_notices()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status. Errors are one line on stderr, unless ``--debug`` asks for more."""
    try:
        status = app(arguments, standalone_mode=False) or DONE
        if status == INTERRUPTED:  # as Typer reports Ctrl-C
            print("layerskip: interrupted", file=sys.stderr)
        return int(status)
    except Exception as error:
        if DEBUG in arguments:
            traceback.print_exc()
        message, status = _explain(error)
        if message:
            print(f"layerskip: {_in_brief(message)}", file=sys.stderr)
        return status


def _in_brief(message: str) -> str:
    """A message that repeats something very long, with the middle left out."""
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"


def _explain(error: Exception) -> tuple[str, int]:
    """An error in one line, and the exit status for it."""
    if hasattr(error, "format_message"):  # Typer's own: unknown option, missing argument and the like
        message = _missing(error) or error.format_message()
        return f"{message} (see --help)" if message else "", WRONG_USAGE  # without a command, the help says it all
    if isinstance(error, LayerSkipError):
        return str(error), WRONG_USAGE if isinstance(error, InvalidInputError) else FAILED
    shortage = out_of_memory(error)
    if shortage is not None:
        return shortage, FAILED
    return f"unexpected {type(error).__name__}: {first_line(error)} ({DEBUG} shows where)", FAILED


def _missing(error: Exception) -> str:
    """What to give where Typer misses an argument that everybody misses at first; empty for other errors."""
    name = getattr(getattr(error, "param", None), "name", None)
    is_missing = type(error).__name__ == "MissingParameter"
    return f"no {name} given; {_WHAT_TO_GIVE[name]}" if is_missing and name in _WHAT_TO_GIVE else ""
