"""Printing: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130  # exit statuses

stdout = Console(highlight=False, markup=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def escape_unencodable() -> None:
    """Let what an encoding such as ASCII has no characters for be escaped, instead of being an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object, alone on stdout."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(result, ensure_ascii=not unicode), flush=True)  # read while the dashboard runs


def print_untruncated(table: Table) -> None:
    """Print a table as wide as its content, so that names can be copied whole even from a narrow terminal."""
    unlimited = stdout.options.update(max_width=10_000)
    Console(width=Measurement.get(stdout, unlimited, table).maximum, highlight=False, markup=False).print(table)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices off the terminal; errors still show."""
    import optuna
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error comes at the end
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.basicConfig(format="%(message)s")


def counted(number: int, noun: str) -> str:
    """A number of things, as ``1 token`` or ``2 tokens``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_speedup(measured: dict[str, Any]) -> str:
    """A profile's measured speedup with its interval, as ``1.23× (95 %: 1.19 to 1.27)``; of one prompt, without."""
    low, high = measured["speedup_low"], measured["speedup_high"]
    interval = f" (95 %: {low:.2f} to {high:.2f})" if low < high else ""  # as `compare` has it
    return f"{measured['speedup']:.2f}×{interval}"


def no_gain_note(measured: dict[str, Any]) -> str | None:
    """A sentence on a measured speedup above 1× that shows no gain, in the words of ``compare``; None on any other."""
    from studies.statistics import CROSSES_ONE, FEW_PROMPTS, FEWEST_PROMPTS

    if measured["speedup"] <= 1:
        return None
    if measured["prompts"] < FEWEST_PROMPTS:
        return f"No clear gain: {FEW_PROMPTS}."
    return CROSSES_ONE if measured["speedup_low"] <= 1 else None


def check_writable(out: Path) -> None:
    """Find out before the search, not after it, that the profile cannot be written."""
    from layerskip.errors import InvalidInputError

    folder = out.absolute().parent
    if out.exists() and not out.is_file():
        raise InvalidInputError(f"--out {out}: is a {'folder' if out.is_dir() else 'device'}; expected a file name")
    if not folder.is_dir():
        raise InvalidInputError(f"--out {out}: no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        raise InvalidInputError(f"--out {out}: the folder {folder} is not writable")
