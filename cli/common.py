"""What commands share: options, printing, and opening a model."""

from __future__ import annotations

import json
import logging
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cli import completion
from layerskip.names import DEVICES, DTYPES, ENGINES

if TYPE_CHECKING:
    pass

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130  # exit statuses

# Options.

DEFAULT_STORAGE = completion.DEFAULT_STORAGE

_debugging = False


def _remember_debug(wanted: bool) -> None:
    global _debugging
    _debugging = wanted


def debugging() -> bool:
    """Whether ``--debug`` was given."""
    return _debugging


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_remember_debug, is_eager=True, help="Show the traceback of an error.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to stdout, and everything else to stderr.")
]
StorageOption = Annotated[
    str, typer.Option(help="Database of studies: any Optuna storage URL.", envvar="LAYERSKIP_STORAGE")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1 …; auto uses a GPU if there is one.",
        autocompletion=completion.one_of("auto", *DEVICES),
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16; auto is bfloat16 on CUDA and float32 elsewhere.",
        autocompletion=completion.one_of("auto", *DTYPES),
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="How forward passes run: eager, or cuda-graphs on one CUDA device (experimental).",
        autocompletion=completion.one_of(*ENGINES),
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Compile sublayers; the first passes then take about a minute.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Another location of the profile's model.",
        show_default="the profile's model id",
        autocompletion=completion.models,
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(help="Alias, Hub id, folder or .gguf file.", autocompletion=completion.models)
]
ProfileArgument = Annotated[
    str,
    typer.Argument(
        help="A draft profile: file, folder, name of a ready profile, or owner/name on the Hub.",
        show_default=False,
        autocompletion=completion.profiles,
    ),
]
StudyArgument = Annotated[
    str, typer.Argument(help="Name of the study.", show_default=False, autocompletion=completion.studies)
]
MeasuredPromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="Prompts, one a line, or .jsonl with 'prompt' or 'messages'.",
        show_default="the built-in ones that searches hold out",
    ),
]
RepeatsOption = Annotated[int, typer.Option(help="How often each method decodes each prompt.", min=1)]


def check_writable(out: Path) -> None:
    """Raise an ``InvalidInputError`` if a file cannot be written to, before the work whose result it is for."""
    from layerskip.errors import InvalidInputError

    folder = out.absolute().parent
    if out.exists() and not out.is_file():
        raise InvalidInputError(f"--out {out}: is a {'folder' if out.is_dir() else 'device'}; expected a file name")
    if not folder.is_dir():
        raise InvalidInputError(f"--out {out}: no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        raise InvalidInputError(f"--out {out}: the folder {folder} is not writable")


# Printing: results to stdout, everything else to stderr.

stdout = Console(highlight=False, markup=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def escape_unencodable() -> None:
    """Print characters that the terminal's encoding lacks, such as ASCII's, as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Keep progress bars and notices of the libraries off the terminal; errors still show."""
    import optuna
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error comes at the end
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.basicConfig(format="%(message)s")


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object, alone on stdout."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(result, ensure_ascii=not unicode), flush=True)  # read while the dashboard runs


def print_untruncated(table: Table) -> None:
    """Print a table as wide as its content, so that names can be copied whole even from a narrow terminal."""
    unlimited = stdout.options.update(max_width=10_000)
    Console(width=Measurement.get(stdout, unlimited, table).maximum, highlight=False, markup=False).print(table)


def write_page(out: Path, page: str) -> None:
    """Write an HTML page to the file of ``--out``."""
    from layerskip.errors import InvalidInputError
    from layerskip.utils import write_atomically

    try:
        write_atomically(out, page)
    except OSError as error:
        raise InvalidInputError(f"--out {out}: cannot write the report: {error.strerror}") from error


def counted(number: int, noun: str) -> str:
    """A number of things, as ``1 token`` or ``2 tokens``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_speedup(measured: dict[str, Any]) -> str:
    """A measured speedup with its interval, as ``1.23× (95 %: 1.19 to 1.27)``; without one if there was one prompt."""
    low, high = measured["speedup_low"], measured["speedup_high"]
    interval = f" (95 %: {low:.2f} to {high:.2f})" if low < high else ""
    return f"{measured['speedup']:.2f}×{interval}"


def describe_near_ties(count: int) -> str:
    """How many outputs diverge from plain decoding, and why that is no error."""
    return f"{counted(count, 'output')} diverge{'s' * (count == 1)} at a near-tie of the top two tokens"


def no_gain_note(measured: dict[str, Any]) -> str | None:
    """A sentence on a measured speedup above 1× that shows no gain, in the words of ``compare``; None on any other."""
    from studies.statistics import CROSSES_ONE, FEW_PROMPTS, FEWEST_PROMPTS

    if measured["speedup"] <= 1:
        return None
    if measured["prompts"] < FEWEST_PROMPTS:
        return f"No clear gain: {FEW_PROMPTS}."
    return CROSSES_ONE if measured["speedup_low"] <= 1 else None
