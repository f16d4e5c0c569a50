"""How a search goes, on the terminal."""

from __future__ import annotations

import time
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cli.common import (
    counted,
    stderr,
)
from layerskip.utils import duration
from search.callbacks import (
    Event,
    FinalistMeasured,
    PhaseStarted,
    Progress,
    PromptMeasured,
    ReferenceReady,
    StudyOpened,
    TrialFinished,
)
from search.objective import SOURCE_KEY
from studies.ranking import basis_of, speedup_of


class SearchProgress:
    """A progress bar on stderr: candidates seen, measured, the best so far, the time left.

    A line is printed for every candidate that is better than all before, and for every one that is measured.

    Args:
        trials: Candidates that the study shall have looked at.
        timeout: Seconds after which no new trial starts, if there is such a limit.
    """

    def __init__(self, trials: int, timeout: float | None) -> None:
        self._trials = trials
        self._timeout = timeout
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=stderr,
        )
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        self._highest = 0.0
        self._measuring = ""
        self._began = time.monotonic()
        self._done_at_start = 0.0

    def __enter__(self) -> SearchProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._task is not None:  # a bar that never showed anything would leave an empty line in a log
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case StudyOpened():
                self._open(event.name, event.progress)
            case PhaseStarted("reference"):
                self._say(f"reference run over {counted(event.total, 'prompt')}, to hold drafts against")
            case ReferenceReady():
                if event.found:
                    self._say(f"{counted(event.found, 'text')} of an earlier reference run used again")
            case PhaseStarted("costs"):
                self._say("measuring what the parts of a step cost here")
            case PhaseStarted("trials"):
                self._began = time.monotonic()
            case PromptMeasured():
                prompts = f": {event.done}/{event.total} prompts" * (event.done > 0)
                self._measuring = "" if event.done == event.total else f"decoding trial {event.trial}{prompts}"
                self._show()
            case TrialFinished():
                self._progress, self._measuring = event.progress, ""
                if event.trial.state == TrialState.COMPLETE:
                    self._tell_of(event.trial)
                self._show(event.progress.seen)
            case PhaseStarted("finalists"):
                self._timeout = None  # limits the search alone
                self._start("finalists", event.total, 0)
            case FinalistMeasured():
                self._say(f"trial {event.trial.number} on held-out prompts: {event.speedup:.3f}×")
                self._show(event.number)

    def _open(self, name: str, progress: Progress) -> None:
        self._say(
            f"study {name}: {progress.seen} of {counted(self._trials, 'candidate')} seen, {progress.measured} measured"
        )
        self._progress, self._highest = progress, progress.best or 0.0
        self._start("candidates", self._trials, progress.seen)

    def _tell_of(self, trial: FrozenTrial) -> None:
        basis, speedup = basis_of(trial), speedup_of(trial)
        if basis == "predicted" and speedup <= self._highest:
            return
        if basis == "predicted":
            self._highest = speedup
        decoded = counted(trial.user_attrs.get("prompts", 0), "prompt")
        stopped = f", stopped after {decoded}" * ("stopped_early" in trial.user_attrs)
        source = trial.user_attrs.get(SOURCE_KEY, "sampler")
        self._say(
            f"trial {trial.number}: {basis} {speedup:.3f}×{stopped}  {trial.user_attrs['skip_set']}; "
            f"draft {trial.user_attrs['draft']}  [{source}]"
        )

    def _say(self, line: str) -> None:
        self._bar.console.print(line, markup=False)

    def _start(self, phase: str, total: int, completed: int) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        else:
            self._bar.start()
        self._task = self._bar.add_task(phase, total=total, note="")
        self._done_at_start = completed
        self._began = time.monotonic()
        self._show(completed)

    def _show(self, done: float | None = None) -> None:
        if self._task is None:
            return
        if done is not None:
            self._bar.update(self._task, completed=done)
        self._bar.update(self._task, note=" · ".join(part for part in self._notes() if part))

    def _notes(self) -> list[str]:
        notes = []
        if self._progress is not None and self._progress.best is not None:
            notes.append(f"{self._progress.measured} measured")
            notes.append(f"best {self._progress.best:.3f}× {self._progress.basis}")
        left = self._seconds_left()
        return [*notes, self._measuring, "" if left is None else f"about {duration(left)} left"]

    def _seconds_left(self) -> float | None:
        """From the pace so far; a time limit may end the search earlier."""
        task = next(task for task in self._bar.tasks if task.id == self._task)
        made = task.completed - self._done_at_start
        if made <= 0:
            return None
        elapsed = time.monotonic() - self._began
        left = elapsed / made * max((task.total or 0) - task.completed, 0)
        return left if self._timeout is None else max(min(left, self._timeout - elapsed), 0)


class Steps:
    """A progress bar on stderr for work of a known number of steps, gone when it is done.

    Args:
        what: What is going on.
        total: Number of steps.
    """

    def __init__(self, what: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def done(self, steps: int) -> None:
        """So many steps are done."""
        self._bar.update(self._task, completed=steps)
