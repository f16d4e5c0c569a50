"""KnapSpec (arXiv 2602.20217): dynamic programming once, for the draft closest to the target model at its cost."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from benchmarks.rivals.contest import Incumbent, Stopwatch, Task
from layerskip import FixedLength, SkipSet
from layerskip.costs import CostModel, DraftParts, speedup
from layerskip.drafting.config import DraftConfig
from layerskip.engine import measure_costs
from search.acceptance_tracer import AcceptanceTracer, SublayerRunner
from search.reference import ReferenceRun
from search.starting_skip_sets import most_similar_paths

_LENGTHS = range(1, 9)


def knapspec(task: Task) -> Iterator[Incumbent]:
    """Attention and MLP sublayers at their measured costs; the cosine similarity replaces the acceptance rate."""
    watch, model = Stopwatch(task), task.model
    measured = measure_costs(task.engine, most_drafted=max(_LENGTHS))
    step = measured.short.step
    costs = [step.attention, step.mlp] * model.num_layers
    with tempfile.TemporaryDirectory() as folder:
        run = ReferenceRun(model, Path(folder), task.fingerprint)
        texts = run.texts(task.prompts.scored[:1], max_new_tokens=task.max_new_tokens)
        text = AcceptanceTracer(model, texts).sublayer_runner()
        skip_sets = [skip_set for _, skip_set in most_similar_paths(text.states, text.run_sublayer, costs)]
        scored = [_best(measured, task, text, skip_set) for skip_set in skip_sets]
    if scored:
        _, skip_set, length = max(scored, key=lambda one: one[0])
        yield Incumbent(watch.seconds, DraftConfig(skip_set, stopping=FixedLength(length)))


def _best(measured: CostModel, task: Task, text: SublayerRunner, skip_set: SkipSet) -> tuple[float, SkipSet, int]:
    """The expected speedup of a draft at its best length."""
    context = float(len(task.prompts.scored[0].tokens))
    costs = measured.at(context).relative()
    cost = costs.draft_step(DraftParts.of(task.model.stack_of(skip_set)))
    alpha = _similarity(text, skip_set)
    speedups = {length: speedup(alpha, length, cost, costs.verification(length + 1)) for length in _LENGTHS}
    length = max(speedups, key=lambda one: speedups[one])
    return speedups[length], skip_set, length


def _similarity(text: SublayerRunner, skip_set: SkipSet) -> float:
    """Cosine of the draft's last hidden states with the target model's, mean over positions."""
    x: Tensor = text.states[:1]
    kept: Sequence[int] = skip_set.kept
    for index in kept:
        x = text.run_sublayer(index, x)
    return float(functional.cosine_similarity(x[0].float(), text.states[-1].float(), dim=-1).mean())
