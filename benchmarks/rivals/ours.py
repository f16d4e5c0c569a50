"""layerskip's own search, as ``layerskip search`` runs it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna

from benchmarks.rivals.contest import Incumbent, Searcher, Task
from layerskip import LayerSkipModel
from layerskip.fingerprint import identify
from search.callbacks import Event, TrialFinished
from search.prompts import PromptSplit
from search.search import Search
from search.search_task import SearchTask
from search.settings import SearchSettings
from search.space import SearchSpace
from studies.ranking import best_trials, config_of
from studies.storage import open_storage

_ENDLESS = 10**6


def ours(sampler: str, space_of: Callable[[LayerSkipModel], SearchSpace]) -> Searcher:
    """The search with one of its samplers in some space."""

    def search(task: Task) -> Iterator[Incumbent]:
        log = _Log(space_of(task.model))
        with tempfile.TemporaryDirectory() as folder:
            settings = SearchSettings(
                trials=_ENDLESS,
                max_new_tokens=task.max_new_tokens,
                prompts_per_trial=len(task.prompts.measured),
                sampler=sampler,
                seed=task.seed,
            )
            search_task = SearchTask(
                identify(task.model, "benchmark"),
                PromptSplit((*task.prompts.scored, *task.prompts.fitted), task.prompts.held_out),
                settings,
                log.space,
                folder=Path(folder),
                ends=time.monotonic() + task.seconds,
            )
            run = Search(task.engine, search_task, open_storage(f"sqlite:///{folder}/studies.db"), on_event=log)
            log.study = run.open()
            run.explore(log.study, run.prepare(log.study))
        yield from log.incumbents

    return search


class _Log:
    """Notes what the search would have answered after each trial."""

    def __init__(self, space: SearchSpace) -> None:
        self._began = time.perf_counter()
        self.space = space
        self.study: optuna.Study | None = None
        self.incumbents: list[Incumbent] = []

    def __call__(self, event: Event) -> None:
        if not isinstance(event, TrialFinished) or self.study is None or event.progress.best is None:
            return
        [best] = best_trials(self.study, 1)
        now = Incumbent(time.perf_counter() - self._began, config_of(best))
        if not self.incumbents or self.incumbents[-1].config != now.config:
            self.incumbents.append(now)
