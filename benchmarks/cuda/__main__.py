"""Proves captured passes on a CUDA device, and measures them against the card's limit, in one run of minutes.

python -m benchmarks.cuda --out results
python -m benchmarks.cuda --out results --device cpu --shape tiny --seconds 60   # every stage, at toy size

Needs torch, transformers, numpy and this repository alone; for its tests, pytest and hypothesis. Stages run in a child
process, which is started anew where one ends it or takes too long; every number is in results/facts.jsonl the moment it
is known.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda.facts import BEGIN, END, ERROR, Facts, read_facts
from benchmarks.cuda.table import print_table

# Seconds that stages take on an H100, in the order in which they matter.
STAGES = {
    "machine": 20,
    "smoke": 60,
    "plain": 45,
    "planted": 130,
    "costs": 45,
    "kernels": 15,
    "waits": 15,
    "rivals": 40,
    "gemma-2": 40,
    "tests": 60,
    "compiled": 60,
}
# A stage that takes so much longer than it should hangs.
_PATIENCE = 2.5


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    out: Path
    seconds: float
    device: str
    shape: str
    stages: tuple[str, ...]
    deadline: float

    @classmethod
    def parsed(cls) -> Arguments:
        parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.splitlines()[0])
        parser.add_argument("--out", type=Path, required=True, help="folder of the results")
        parser.add_argument("--seconds", type=float, default=480, help="the run's limit")
        parser.add_argument("--device", default="cuda")
        parser.add_argument("--shape", choices=("llama-3-8b", "tiny"), default="llama-3-8b", help="of the main model")
        parser.add_argument("--stages", default=",".join(STAGES), help="some of " + ", ".join(STAGES))
        parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)  # of a child
        given = parser.parse_args()
        stages = tuple(given.stages.split(","))
        if unknown := [stage for stage in stages if stage not in STAGES]:
            parser.error(f"--stages: {unknown[0]} is none of {', '.join(STAGES)}")
        return cls(given.out, given.seconds, given.device, given.shape, stages, given.deadline)

    def of_child(self, stages: tuple[str, ...], deadline: float) -> list[str]:
        """The command of a child that runs some stages."""
        options = ["--out", self.out, "--device", self.device, "--shape", self.shape]
        options += ["--stages", ",".join(stages), "--deadline", deadline]
        return [sys.executable, "-m", "benchmarks.cuda", *map(str, options)]


def supervise(arguments: Arguments) -> None:
    """Run all stages in children, one after the other where one ends early."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = arguments.out / "facts.jsonl"
    for earlier in (facts, arguments.out / "output.txt", arguments.out / "tracebacks.txt"):
        earlier.unlink(missing_ok=True)
    deadline = time.time() + arguments.seconds
    left = arguments.stages
    while left and time.time() < deadline:
        with (arguments.out / "output.txt").open("a", encoding="utf-8") as output:
            child = subprocess.Popen(
                arguments.of_child(left, deadline), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        problem = _watch(child, facts, deadline)
        begun = [fact["stage"] for fact in read_facts(facts) if fact["name"] == BEGIN]
        ended = {fact["stage"] for fact in read_facts(facts) if fact["name"] == END}
        if problem is not None:
            Facts(facts, begun[-1] if begun else left[0]).add(ERROR, problem)
        unfinished = begun[-1:] if begun and begun[-1] not in ended else []
        after = tuple(stage for stage in left if stage not in ended and stage not in unfinished)
        if after == left:  # it did not begin
            break
        left = after
    print_table(facts, list(arguments.stages))


def _watch(child: subprocess.Popen[bytes], facts: Path, deadline: float) -> str | None:
    """Wait until a child ends; end it where a stage hangs. What went wrong, if anything did."""
    while child.poll() is None:
        time.sleep(0.5)
        marks = [fact for fact in read_facts(facts) if fact["name"] in (BEGIN, END)]
        if not marks or marks[-1]["name"] == END:
            if time.time() > deadline + 10:
                return _ended(child, "no time was left")
            continue
        taken = time.time() - marks[-1]["t"]
        if taken > _PATIENCE * STAGES[marks[-1]["stage"]] or time.time() > deadline + 10:
            return _ended(child, f"ended after {taken:.0f} s")
    if child.returncode == 0:
        return None
    return f"the process ended with {child.returncode}; see output.txt"


def _ended(child: subprocess.Popen[bytes], why: str) -> str:
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return why


def main() -> None:
    """Run as parent, or as the child that it starts."""
    arguments = Arguments.parsed()
    if not arguments.deadline:
        supervise(arguments)
        return
    from benchmarks.cuda.child import run_stages

    estimates = {stage: STAGES[stage] for stage in arguments.stages}
    sys.exit(run_stages(arguments.out, arguments.device, arguments.shape, estimates, arguments.deadline))


if __name__ == "__main__":
    main()
