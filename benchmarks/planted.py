"""Whether the search finds the best skip set: on models so small that every one can be tried.

python -m benchmarks.planted --seeds 10 --json planted.json

Each model is a tiny random Llama with planted redundancy (benchmarks/redundant_model.py). The best skip set is found by
trying all of them: real estimates on a real reference run, replayed at known costs. Then the search as ``layerskip
search`` runs it, without decoding for real, has to find it among a few of them, with warm starts and without.

Found in so many of 10 models, with 120 candidates, warm / cold (2026-11-21, two CPU cores):

- 4095 skip sets: tpe 10 / 10, greybox 10 / 9, random 9 / 0. Where sublayers do their damage apart, the warm start that
  ranks them is mostly the optimum already.
- 1023 skip sets, ``--layers 5 --undone``: tpe 10 / 10, greybox 10 / 10, random 5 / 1. No ranking shows that two MLPs
  undo each other; the sampler has to find out.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, cast

import optuna
import torch
import typer
from optuna.storages import InMemoryStorage
from rich.console import Console
from rich.table import Table

from benchmarks.redundant_model import Planted, flat_costs, random_texts, redundant_model
from benchmarks.setting import write_json
from layerskip import LayerSkipModel, SkipSet
from layerskip.drafting.config import DraftConfig
from layerskip.engine import EagerEngine
from layerskip.fingerprint import identify
from layerskip.utils import library_versions
from search.prompts import PromptSplit
from search.search import Search
from search.search_task import SearchTask
from search.settings import SAMPLERS, SearchSettings
from search.space import SearchSpace
from search.warm_starts import STARTED_KEY
from studies.ranking import FULLY_TRACED_KEY, evaluated_trials, prediction_of
from studies.storage import ReconnectingStorage
from studies.study import COSTS_KEY

console = Console(highlight=False, width=150)
# Half of them are scored; candidates that cannot win are given up after the first four of those.
_PROMPTS = 16
_MAX_NEW_TOKENS = 24
_SAME = 1e-9


class _NoHeartbeats:
    def beating(self, study: str, trial: int) -> AbstractContextManager[None]:
        return nullcontext()

    def stale_trials(self, study: optuna.Study) -> list[int]:
        return []


class _InMemory(InMemoryStorage):
    """Stores neither measurements, for none are made, nor heartbeats: a database would take most of the time here."""

    records = object()
    heartbeats = _NoHeartbeats()


@dataclass(frozen=True)
class Optimum:
    """The best of all skip sets of a model.

    Args:
        skip_set: Itself.
        speedup: Predicted of it.
        shows_planted: Whether it leaves out all that is redundant and nothing that is needed.
    """

    skip_set: SkipSet
    speedup: float
    shows_planted: bool


@dataclass(frozen=True)
class RoundResult:
    """What one search found.

    Args:
        share: Of the speedup that can be gained.
        needed: Candidates looked at until the optimum was among them; None if it never was.
    """

    share: float
    needed: int | None


class PlantedProblem:
    """A model, what it decodes, and what its parts cost.

    Args:
        num_layers: Decoder layers; there are ``4 ** num_layers - 1`` skip sets.
        seed: Which model.
        folder: Where its reference run is kept.
        undone: Whether one of its MLPs undoes another.
    """

    def __init__(self, num_layers: int, seed: int, folder: Path, *, undone: bool = False) -> None:
        self.planted = Planted.drawn(num_layers, seed, undone=undone)
        self.model: LayerSkipModel = redundant_model(self.planted, seed)
        self.space = SearchSpace(num_layers)
        self._identity = identify(self.model, "planted")
        self._prompts: PromptSplit = random_texts(seed, search=_PROMPTS)
        self._costs = flat_costs(num_layers, self.space.most_drafted)
        self._folder = folder

    def optimum(self) -> Optimum:
        """The best skip set, by trying all."""
        search = self._search(self._settings())
        study = search.open()
        self._give_costs(study)
        predictor = search.prepare(study).predictor
        speedups = {s: predictor.predict(DraftConfig(s)).speedup for s in skip_sets(self.space.num_layers)}
        best = max(speedups, key=lambda skip_set: speedups[skip_set])
        return Optimum(best, speedups[best], self.planted.shows_in(best))

    def search(self, sampler: str, *, warm: bool, trials: int, seed: int) -> list[float]:
        """Predicted speedups in the order in which a search came upon them; 0 for candidates that it gave up."""
        search = self._search(self._settings(trials=trials, sampler=sampler, seed=seed))
        study = search.open()
        self._give_costs(study)
        study.set_user_attr(STARTED_KEY, not warm)
        search.explore(study, search.prepare(study))
        return [prediction_of(trial) * trial.user_attrs[FULLY_TRACED_KEY] for trial in evaluated_trials(study)]

    def _search(self, settings: SearchSettings) -> Search:
        task = SearchTask(self._identity, self._prompts, settings, self.space, folder=self._folder)
        return Search(EagerEngine(self.model), task, cast(ReconnectingStorage, _InMemory()))

    def _settings(self, *, trials: int = 1, sampler: str = "tpe", seed: int = 0) -> SearchSettings:
        return SearchSettings(
            trials=trials, max_new_tokens=_MAX_NEW_TOKENS, measuring_share=0, sampler=sampler, seed=seed
        )

    def _give_costs(self, study: optuna.Study) -> None:
        study.set_user_attr(COSTS_KEY, self._costs.to_json())


def skip_sets(num_layers: int) -> Iterator[SkipSet]:
    """All of them."""
    for mask in itertools.product((False, True), repeat=2 * num_layers):
        if not all(mask):
            yield SkipSet.from_mask(mask)


def outcome(found: Sequence[float], optimum: float) -> RoundResult:
    """What a search's speedups are worth."""
    needed = next((number for number, speedup in enumerate(found, 1) if speedup >= optimum - _SAME), None)
    return RoundResult((max(found) - 1) / (optimum - 1), needed)


def run(
    seed: int, layers: int, trials: int, samplers: Sequence[str], undone: bool
) -> tuple[Optimum, dict[str, RoundResult]]:
    """Try everything, then let every sampler search."""
    torch.set_num_threads(1)
    _be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        problem = PlantedProblem(layers, seed, Path(folder), undone=undone)
        optimum = problem.optimum()
        outcomes = {
            f"{sampler}, {'warm' if warm else 'cold'}": outcome(
                problem.search(sampler, warm=warm, trials=trials, seed=seed), optimum.speedup
            )
            for sampler in samplers
            for warm in (True, False)
        }
    return optimum, outcomes


def report(optima: Sequence[Optimum], outcomes: Sequence[Mapping[str, RoundResult]]) -> None:
    """Print the table."""
    speedups = [one.speedup for one in optima]
    sizes = [len(one.skip_set) for one in optima]
    console.print(
        f"{len(optima)} models: the best skip set leaves out {min(sizes)} to {max(sizes)} sublayers for "
        f"{min(speedups):.2f}× to {max(speedups):.2f}×; it is all that is redundant and nothing that is needed in "
        f"{sum(one.shows_planted for one in optima)}"
    )
    table = Table("sampler, starts", "found", "of the gain, mean", "least", "candidates until found, median", box=None)
    for name in outcomes[0]:
        runs = [one[name] for one in outcomes]
        needed = [one.needed for one in runs if one.needed is not None]
        shares = [one.share for one in runs]
        median = f"{statistics.median(needed):.0f}" if needed else "–"
        found = f"{len(needed)} of {len(runs)}"
        table.add_row(name, found, f"{statistics.mean(shares):.1%}", f"{min(shares):.1%}", median)
    console.print(table)


def _in_short(found: Mapping[str, RoundResult]) -> str:
    return " · ".join(f"{name}: {one.needed or f'{one.share:.0%} of the gain'}" for name, one in found.items())


def main(
    seeds: Annotated[int, typer.Option(help="Models to search.")] = 10,
    layers: Annotated[int, typer.Option(help="Decoder layers of each: 4 to the power of it skip sets.")] = 6,
    trials: Annotated[int, typer.Option(help="Candidates that each search looks at.")] = 120,
    undone: Annotated[bool, typer.Option(help="Let one MLP undo another: both can go, and neither alone.")] = False,
    workers: Annotated[int, typer.Option(help="Models at a time.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="A sampler; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Compare what searches find with what there is to be found."""
    each = (range(seeds), [layers] * seeds, [trials] * seeds, [only or SAMPLERS] * seeds, [undone] * seeds)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = []
        for seed, (best, found) in enumerate(pool.map(run, *each)):
            console.print(f"model {seed}: {best.skip_set}, {best.speedup:.3f}×; {_in_short(found)}")
            results.append((best, found))
    optima, outcomes = zip(*results, strict=True)
    report(optima, outcomes)
    figures = [
        {"seed": seed, "skip_set": str(best.skip_set), "speedup": best.speedup, "shows_planted": best.shows_planted}
        | {name: asdict(one) for name, one in found.items()}
        for seed, (best, found) in enumerate(zip(optima, outcomes, strict=True))
    ]
    settings = {"layers": layers, "trials": trials, "undone": undone, "versions": library_versions()}
    write_json(json, settings | {"figures": figures})


def _be_quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


if __name__ == "__main__":
    typer.run(main)
