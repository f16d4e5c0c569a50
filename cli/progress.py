"""How a search goes, on the terminal."""

from __future__ import annotations

import time
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cli.output import stderr
from search.study import SOURCE_KEY, SearchObserver


class SearchProgress(SearchObserver):
    """A progress bar on stderr with the best speedup so far and the time left, and a line for each trial.

    Args:
        trials: Trials that the study shall have.
        timeout: Seconds after which no new trial starts, if there is such a limit.
    """

    def __init__(self, trials: int, timeout: float | None) -> None:
        self._trials = trials
        self._timeout = timeout
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=stderr,
        )
        self._task: TaskID | None = None
        self._best: float | None = None
        self._completed = 0
        self._began = time.monotonic()
        self._done_at_start = 0.0

    def __enter__(self) -> SearchProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def study_opened(self, name: str, completed: int) -> None:
        self._bar.console.print(f"study {name}: {completed} of {self._trials} trials done")
        self._start("trials", self._trials, completed)

    def reference_begins(self, prompts: int) -> None:
        self._bar.console.print(f"decoding {prompts} prompts plainly, for drafts to learn from")

    def trials_begin(self) -> None:
        self._began = time.monotonic()

    def prompt_measured(self, number: int, total: int) -> None:
        self._show(self._completed + number / total)

    def trial_finished(self, completed: int, trial: FrozenTrial, best: float | None) -> None:
        self._completed, self._best = completed, best
        if trial.state == TrialState.COMPLETE:
            stopped = f", stopped after {trial.user_attrs['prompts']} prompts" * ("stopped_early" in trial.user_attrs)
            source = trial.user_attrs.get(SOURCE_KEY, "sampler")
            self._bar.console.print(
                f"trial {trial.number}: {trial.values[0]:.3f}×{stopped}  {trial.user_attrs['skip_set']}; "
                f"draft {trial.user_attrs['draft_exit']}  [{source}]",
                markup=False,
            )
        self._show(completed)

    def finalists_chosen(self, count: int) -> None:
        self._timeout = None  # limits the search alone
        self._start("finalists", count, 0)

    def finalist_measured(self, number: int, trial: FrozenTrial, speedup: float) -> None:
        self._completed = number
        self._bar.console.print(f"trial {trial.number} on held-out prompts: {speedup:.3f}×", markup=False)
        self._show(number)

    def _start(self, phase: str, total: int, completed: int) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(phase, total=total, note="")
        self._completed = completed
        self._done_at_start = completed
        self._began = time.monotonic()
        self._show(completed)

    def _show(self, done: float) -> None:
        if self._task is None:
            return
        best = "" if self._best is None else f"best {self._best:.3f}×"
        left = self._seconds_left(done)
        note = " · ".join(part for part in (best, "" if left is None else f"about {_duration(left)} left") if part)
        self._bar.update(self._task, completed=done, note=note)

    def _seconds_left(self, done: float) -> float | None:
        """From the pace so far; a time limit may end the search earlier."""
        made = done - self._done_at_start
        if made <= 0 or self._task is None:
            return None
        elapsed = time.monotonic() - self._began
        task = next(task for task in self._bar.tasks if task.id == self._task)
        left = elapsed / made * max((task.total or 0) - done, 0)
        return left if self._timeout is None else max(min(left, self._timeout - elapsed), 0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
