"""Whether a search's figures hold on a busy machine: search beside a process that burns a core, then measure in quiet.

python -m benchmarks.noise --trials 60 --timeout 120
"""

from __future__ import annotations

import json as json_module
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.setting import write_json

console = Console(highlight=False, width=150)
# A speedup that was measured beside others may differ by so much from one measured in quiet, or must be marked.
_TOLERANCE = 0.1


def burn(shortest: float, longest: float, seed: int) -> None:
    """Use a core in bursts of random length, with pauses as long, for ever."""
    source = random.Random(seed)
    while True:
        ends = time.monotonic() + source.uniform(shortest, longest)
        while time.monotonic() < ends:
            pass
        time.sleep(source.uniform(shortest, longest))


@contextmanager
def busy_neighbour(shortest: float, longest: float, seed: int) -> Iterator[None]:
    """A process that burns a core while the block runs."""
    process = multiprocessing.get_context("spawn").Process(target=burn, args=(shortest, longest, seed), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def layerskip(*arguments: object) -> dict[str, Any]:
    """Run a command of layerskip; its JSON."""
    command = [sys.executable, "-c", "from cli.main import main; main()", *map(str, arguments), "--json"]
    result: dict[str, Any] = json_module.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def main(
    model: str = "smollm2",
    trials: int = 100,
    timeout: Annotated[float, typer.Option(help="Seconds to evaluate candidates for.")] = 120,
    shortest: Annotated[float, typer.Option(help="Shortest burst and pause, in seconds.")] = 3,
    longest: Annotated[float, typer.Option(help="Longest burst and pause, in seconds.")] = 10,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Compare a profile's held-out speedup, measured on a busy machine, with that measured in quiet."""
    with tempfile.TemporaryDirectory() as folder:
        out, storage = Path(folder) / "profile.json", f"sqlite:///{folder}/studies.db"
        budget = ("--trials", trials, "--timeout", timeout, "--seed", seed)
        with busy_neighbour(shortest, longest, seed):
            searched = layerskip("search", model, *budget, "--out", out, "--storage", storage)
        quiet = layerskip("bench", out)
    difference = searched["speedup"] / quiet["speedup"] - 1
    verdict = "holds" if abs(difference) < _TOLERANCE else "does not hold"
    if searched["disturbed"]:
        verdict += f", marked uncertain on {searched['disturbed']} prompts"
    console.print(
        f"{searched['measured']} of {searched['trials']} candidates measured · held-out speedup "
        f"{searched['speedup']:.3f}× beside a busy process, {quiet['speedup']:.3f}× in quiet: "
        f"{difference:+.1%}, {verdict}"
    )
    write_json(json, {"model": model, "busy": searched, "quiet": quiet, "difference": difference})


if __name__ == "__main__":
    typer.run(main)
