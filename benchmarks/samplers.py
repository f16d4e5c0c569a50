"""How much of what can be gained the samplers find, on a simulated skip problem.

python -m benchmarks.samplers --json samplers.json

The problem: 60 bits; leaving out a sublayer multiplies the acceptance rate, attention costs a third of an MLP, the head
15 % of a step, and verifying a token more costs 1 % of one. The best masks leave out about half of the sublayers at an
acceptance rate of 0.7 to 0.9, as the published ones of 13B models do. With ``--interaction``, near sublayers do more or
less damage together than apart. A trial sees the acceptance rate through a sample of positions, and the speedup with
noise. What counts is the true speedup of the trial with the best measured one.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import typer
from numpy.typing import NDArray
from optuna.samplers import BaseSampler
from rich.console import Console
from rich.table import Table

from benchmarks.setting import write_json
from layerskip import SkipSet
from layerskip.costs import Costs, PassCosts, StepCosts
from search.samplers import DraftCosts, make_sampler
from search.samplers.draft_costs import Masks
from search.space import SearchSpace
from search.starting_skip_sets import least_damage

console = Console(highlight=False)
LAYERS = 30
SPACE = SearchSpace(LAYERS)
_HEAD = 0.15
_POSITIONS = 1000
# Agreement by chance, which is left whatever is skipped.
_CHANCE = 0.02


def simulated_costs() -> DraftCosts:
    """Costs of the simulated model: an MLP costs three times as much as attention, verification is nearly flat."""
    attention = (1 - _HEAD) / (4 * LAYERS)
    step = StepCosts(fixed=0.0, attention=attention, mlp=3 * attention, bridge=0.0, head={0: _HEAD})
    widths = range(1, SPACE.max_draft_length + 2)
    passes = PassCosts({width: 0.99 - _HEAD + 0.01 * width for width in widths}, dict.fromkeys(widths, _HEAD))
    return DraftCosts(Costs(0.0, step, passes, 0.0), _no_bridges, SPACE.max_draft_length)


def _sublayer_costs(costs: DraftCosts) -> list[float]:
    return [costs.costs.step.attention, costs.costs.step.mlp] * LAYERS


def _no_bridges(masks: Masks) -> NDArray[np.intp]:
    return np.zeros(len(masks), dtype=np.intp)


class Problem:
    """A model whose sublayers do a hidden damage each, most of them little, some of them much, the outer ones more.

    Args:
        seed: Which model.
        noise: Deviation of a measured speedup, relative.
        interaction: Deviation of what two sublayers at most two layers apart do together, in units of what they do
            apart (geometric mean).
    """

    def __init__(self, seed: int, noise: float, interaction: float = 0.0) -> None:
        rng = np.random.default_rng([seed, 0])
        edge = np.ones(2 * LAYERS)
        edge[:4] = edge[-4:] = 5
        self._damage = rng.lognormal(np.log(0.008), 1.5, 2 * LAYERS) * edge
        near = np.abs(np.subtract.outer(range(2 * LAYERS), range(2 * LAYERS))) <= 4
        together = interaction * np.sqrt(np.outer(self._damage, self._damage)) * rng.standard_normal(near.shape)
        self._together = np.triu(together * near, 1)
        self._noise = noise
        self._seed = seed
        self.forget_noise()
        self.costs = simulated_costs()
        self.baseline = self.speedup([False] * 2 * LAYERS)
        self.attainable = self._attainable()

    def forget_noise(self) -> None:
        """Draw the same noise again, so that contenders do not depend on those before them."""
        self._rng = np.random.default_rng([self._seed, 1])

    def acceptance(self, mask: Sequence[bool]) -> float:
        """α, without noise."""
        skipped = np.array(mask, dtype=float)
        damage = max(self._damage @ skipped + skipped @ self._together @ skipped, 0)
        return float(_CHANCE + (1 - _CHANCE) * np.exp(-damage))

    def speedup(self, mask: Sequence[bool]) -> float:
        """The true speedup."""
        step = self.costs.draft_steps(SPACE.options[0], np.array([mask], dtype=bool))
        return float(self.costs.best_speedups(np.array([self.acceptance(mask)]), step)[0])

    def estimate(self, mask: Sequence[bool]) -> float:
        """α over a sample of positions."""
        return float(self._rng.binomial(_POSITIONS, self.acceptance(mask)) / _POSITIONS)

    def measure(self, mask: Sequence[bool]) -> float:
        """The speedup, with noise."""
        return self.speedup(mask) * (1 + self._noise * float(self._rng.standard_normal()))

    def share(self, mask: Sequence[bool]) -> float:
        """How much of what can be gained over skipping nothing a mask gains; may be negative."""
        return (self.speedup(mask) - self.baseline) / (self.attainable - self.baseline)

    def _attainable(self) -> float:
        """Of the best mask that prefixes by damage ÷ cost and flips of one and two bits lead to."""
        order = np.argsort(self._damage / _sublayer_costs(self.costs))
        prefixes = [[index in set(order[:count].tolist()) for index in range(2 * LAYERS)] for count in range(60)]
        best = max(prefixes, key=self.speedup)
        while True:
            flipped = max(self._flips(best), key=self.speedup)
            if self.speedup(flipped) <= self.speedup(best):
                return self.speedup(best)
            best = flipped

    def _flips(self, mask: Sequence[bool]) -> Iterator[list[bool]]:
        for pair in itertools.combinations_with_replacement(range(2 * LAYERS), 2):
            yield [skip != (index in pair) for index, skip in enumerate(mask)]


def ranked_masks(problem: Problem) -> list[tuple[bool, ...]]:
    """Warm starts: those of the search, by a noisy estimate of each sublayer alone."""
    starts = least_damage(lambda skip_set: problem.estimate(skip_set.mask), _sublayer_costs(problem.costs))
    return [SkipSet(LAYERS).mask, *(skip_set.mask for _, skip_set in starts)]


def search(problem: Problem, sampler: BaseSampler, trials: int, starts: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Search, and say how much of what can be gained the best trial found, and the best of 10 finalists."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for mask in starts:
        study.enqueue_trial({name: int(skip) for name, skip in zip(SPACE.bit_names, mask, strict=True)})

    def objective(trial: optuna.Trial) -> float:
        mask = [bool(trial.suggest_categorical(name, (0, 1))) for name in SPACE.bit_names]
        trial.set_user_attr("acceptance", problem.estimate(mask))
        return problem.measure(mask)

    started = time.perf_counter()
    study.optimize(objective, n_trials=trials)
    seconds = time.perf_counter() - started
    masks = {trial.number: [bool(trial.params[name]) for name in SPACE.bit_names] for trial in study.trials}
    ranked = sorted(study.trials, key=lambda trial: trial.value or 0.0, reverse=True)[:10]
    enqueued = max(study.trials[: len(starts)], key=lambda trial: trial.value or 0.0, default=None)
    finalist = max(ranked, key=lambda trial: float(np.mean([problem.measure(masks[trial.number]) for _ in range(10)])))
    return {
        "share": problem.share(masks[ranked[0].number]),
        "share_of_finalists": problem.share(masks[finalist.number]),
        "share_of_starts": problem.share(masks[enqueued.number]) if enqueued else 0.0,
        "seconds_a_trial": seconds / trials,
    }


def contenders() -> dict[str, tuple[str, bool]]:
    """What is compared: a sampler, and whether it is given warm starts."""
    return {
        "tpe": ("tpe", False),
        "tpe, warm": ("tpe", True),
        "greybox": ("greybox", False),
        "greybox, warm": ("greybox", True),
    }


def run(problem: Problem, sampler: str, warm: bool, *, seed: int, trials: int) -> dict[str, float]:
    """One search of one contender."""
    problem.forget_noise()
    starts = ranked_masks(problem) if warm else []
    return search(problem, make_sampler(sampler, SPACE, problem.costs, seed=seed), trials, starts)


def table(results: dict[str, list[dict[str, float]]]) -> Table:
    """Shares of the attainable gain, means over seeds; finalists are the 10 best, measured again 10 times each."""
    shown = Table("sampler", "gain, %", "range", "of finalists, %", "of starts, %", "ms a trial")
    for name, runs in results.items():
        of: Callable[[str], list[float]] = lambda key, runs=runs: [figures[key] for figures in runs]  # type: ignore[misc]  # noqa: E731
        shares = of("share")
        shown.add_row(
            name,
            f"{100 * statistics.mean(shares):.0f}",
            f"{100 * min(shares):.0f} to {100 * max(shares):.0f}",
            f"{100 * statistics.mean(of('share_of_finalists')):.0f}",
            f"{100 * statistics.mean(of('share_of_starts')):.0f}",
            f"{1000 * statistics.mean(of('seconds_a_trial')):.0f}",
        )
    return shown


def main(
    seeds: Annotated[int, typer.Option(help="Simulated models to search.")] = 5,
    trials: Annotated[int, typer.Option(help="Trials of each search.")] = 150,
    noise: Annotated[float, typer.Option(help="Relative deviation of a measured speedup.")] = 0.02,
    interaction: Annotated[float, typer.Option(help="How much near sublayers do together that they do not apart.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="A contender to run; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Compare the samplers."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    problems = [Problem(seed, noise, interaction) for seed in range(seeds)]
    attainable = [problem.attainable for problem in problems]
    console.print(f"attainable speedup: {min(attainable):.2f} to {max(attainable):.2f}")
    results: dict[str, Any] = {}
    for name, (sampler, warm) in contenders().items():
        if not only or name in only:
            results[name] = [run(p, sampler, warm, seed=seed, trials=trials) for seed, p in enumerate(problems)]
    console.print(table(results))
    settings = {"trials": trials, "noise": noise, "interaction": interaction}
    write_json(json, {**settings, "attainable": attainable, "results": results})


if __name__ == "__main__":
    typer.run(main)
