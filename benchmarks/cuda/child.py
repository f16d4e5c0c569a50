"""Runs stages, one after the other, in a process of their own."""

from __future__ import annotations

import faulthandler
import gc
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.cuda import stages_decoding, stages_passes
from benchmarks.cuda.bench import Bench, Stage
from benchmarks.cuda.facts import BEGIN, END, ERROR, Facts

_STAGES: Mapping[str, Stage] = {
    "machine": stages_passes.read_facts_of_machine,
    "smoke": stages_decoding.smoke,
    "plain": stages_passes.time_plain_steps,
    "planted": stages_decoding.decode_planted,
    "costs": stages_passes.time_verifications_and_drafts,
    "kernels": stages_passes.profile_kernels,
    "waits": stages_passes.count_waits,
    "tests": stages_decoding.run_gpu_tests,
    "compiled": stages_decoding.time_compiled_sublayers,
    "gemma-2": stages_decoding.time_gemma_2,
    "rivals": stages_decoding.time_rivals,
}
# A stage is begun if this share of the time that it should take is left: part of its numbers is better than none.
_LEAST_LEFT = 0.4
# Where a device does not answer any more.
_STICKY = 3


def run_stages(out: Path, device: str, shape: str, estimates: Mapping[str, float], deadline: float) -> int:
    """Run some stages.

    Args:
        out: Folder of the results.
        device: Where models are.
        shape: Of the main model.
        estimates: Seconds that the stages should take, by their names, in order.
        deadline: When the run ends, in seconds since the epoch.

    Returns:
        The exit status: 0, or another one where the process must be started anew for the other stages.
    """
    bench = Bench(torch.device(device), shape, out, deadline)
    for name, estimate in estimates.items():
        facts = Facts(bench.facts, name)
        facts.add(BEGIN, time.strftime("%H:%M:%S"))
        if time.time() + _LEAST_LEFT * estimate > deadline and not bench.is_tiny:
            facts.add(ERROR, "left out: no time")
        else:
            _run(bench, facts, name, estimate)
        facts.add(END, time.strftime("%H:%M:%S"))
        gc.collect()
        if not _answers(bench.device):
            return _STICKY
    return 0


def _run(bench: Bench, facts: Facts, name: str, estimate: float) -> None:
    with (bench.out / "tracebacks.txt").open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(2 * estimate, file=file)  # before the parent ends the process
        try:
            _STAGES[name](bench, facts)
        except Exception as error:  # the other stages may do
            traceback.print_exc(file=file)
            facts.add(ERROR, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
        finally:
            faulthandler.cancel_dump_traceback_later()


def _answers(device: torch.device) -> bool:
    """Whether a device still works: after some errors every call of the process fails."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True
