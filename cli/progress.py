"""Progress of long commands on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from optuna.trial import FrozenTrial
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cli.common import counted, stderr
from layerskip.training import Agreement, EvalResult, Trained
from layerskip.utils import duration
from search import callbacks
from search.callbacks import (
    Evaluated,
    FinalistMeasured,
    HeldOutPromptMeasured,
    PhaseStarted,
    PolicyChosen,
    PromptMeasured,
    ReferenceDecoded,
    ReferenceReady,
    StudyOpened,
    TextsWritten,
    TrainingEnded,
    TrainingStarted,
    TrialFinished,
)
from studies.ranking import PREDICTION_STEP, SOURCE_KEY, basis_of, config_of, is_stopped, speedup_of

# The phase that a time limit ends.
_CANDIDATES = "candidates"


class ProgressDisplay:
    """Shows the events of a search or of training a draft: a progress bar, and lines for what is worth keeping.

    Of the candidates, those get a line that are better than all before, or that were measured.

    Args:
        trials: Candidates that a search will have evaluated in total.
        timeout: Seconds after which a search starts no new trial; None for no limit.
    """

    def __init__(self, trials: int = 0, timeout: float | None = None) -> None:
        self._trials = trials
        self._timeout = timeout
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
            console=stderr, transient=True, disable=not stderr.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._started = time.monotonic()
        self._done_at_start = 0.0
        self._search: callbacks.Progress | None = None
        self._highest_prediction = 0.0
        self._measuring = ""

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._task is not None:  # a bar that was never started would leave an empty line in a log
            self._bar.stop()

    def __call__(self, event: callbacks.Event) -> None:
        """Show an event."""
        match event:
            case StudyOpened():
                self._open(event.name, event.progress)
            case PhaseStarted("reference"):
                self._print(
                    f"{counted(event.total, 'reference prompt')}: what the model writes shows which drafts it would "
                    "accept"
                )
                self._start("reference prompts", event.total)
            case ReferenceDecoded():
                self._advance(event.done)
            case ReferenceReady():
                if event.found:
                    self._print(f"{counted(event.found, 'reference text')} reused from an earlier search")
            case PhaseStarted("costs"):
                self._print("measuring the costs of passes on this device, which takes half a minute or more")
            case PhaseStarted("trials"):
                self._print("trying candidates: each is predicted, the most promising ones are measured by decoding")
                self._start(_CANDIDATES, self._trials, self._search.evaluated if self._search else 0)
            case PhaseStarted("finalists"):
                self._say_what_ended_the_trials()
                self._print(
                    "measuring the best candidates on held-out prompts, which takes a minute or more: the best of many "
                    "looks better than it is"
                )
                self._start("held-out prompts", event.total)
            case PhaseStarted("baseline"):
                self._print("timing transformers' plain decoding of a few prompts")
            case PhaseStarted("texts"):
                self._print("the target model writes texts to train on; texts of earlier runs are reused")
                self._start("positions", event.total)
            case TextsWritten():
                self._advance(event.positions)
            case TrainingStarted():
                self._print(
                    f"training on {event.positions} positions, drafts of {counted(event.vocabulary, 'token')}; "
                    "held-out agreement:"
                )
                self._start("training", 1)
            case Evaluated():
                self._evaluated(event.result, event.ideal)
            case TrainingEnded():
                self._training_ended(event.trained)
            case PolicyChosen():
                self._print(f"predicted {event.predicted:.3f}× with draft {event.config.details}")
                self._start("prompts", 1)
            case PromptMeasured(trial=None):
                self._advance(event.done / event.total, f"{event.done}/{event.total}")
            case PromptMeasured():
                prompts = f": {event.done}/{event.total} prompts" * (event.done > 0)
                self._measuring = "" if event.done == event.total else f"decoding trial {event.trial}{prompts}"
                self._advance(None)
            case TrialFinished():
                self._search, self._measuring = event.progress, ""
                if PREDICTION_STEP in event.trial.intermediate_values:
                    self._trial_finished(event.trial)
                self._advance(event.progress.evaluated)
            case HeldOutPromptMeasured():
                self._advance(event.done)
            case FinalistMeasured():
                precision = config_of(event.trial).precision
                at = "full precision" if precision == "full" else precision
                self._print(f"trial {event.trial.number} on held-out prompts: {event.speedup:.3f}× at {at}")

    def _open(self, study: str, progress: callbacks.Progress) -> None:
        candidates = counted(self._trials, "candidate")
        self._print(f"study {study}: {progress.evaluated} of {candidates} evaluated, {progress.measured} measured")
        self._search, self._highest_prediction = progress, progress.best or 0.0

    def _say_what_ended_the_trials(self) -> None:
        if self._timeout is not None and self._search is not None and self._search.evaluated < self._trials:
            candidates = f"{self._search.evaluated} of {counted(self._trials, 'candidate')}"
            self._print(f"--timeout {self._timeout:g} ended the trials after {candidates}")

    def _trial_finished(self, trial: FrozenTrial) -> None:
        basis, speedup = basis_of(trial), speedup_of(trial)
        if basis == "predicted":
            if speedup <= self._highest_prediction:
                return
            self._highest_prediction = speedup
        attributes = trial.user_attrs
        decoded = counted(attributes.get("prompts", 0), "prompt")
        stopped = f" on {decoded}, cannot win" * is_stopped(trial)
        self._print(
            f"trial {trial.number}: {basis} {speedup:.3f}×{stopped}  {attributes['skip_set']}; "
            f"draft {attributes['draft']}  [{attributes.get(SOURCE_KEY, 'sampler')}]"
        )

    def _evaluated(self, result: EvalResult, ideal: float) -> None:
        left = "" if result.seconds_left is None else f", {duration(result.seconds_left)} left"
        self._print(
            f"{100 * result.progress:3.0f} %  {format_agreement(result.agreement)}, loss {result.agreement.loss:.3f}, "
            f"ideal speedup {ideal:.2f}×{left}"
        )
        self._advance(result.progress, f"{100 * result.agreement.top[1]:.1f} %")

    def _training_ended(self, trained: Trained) -> None:
        progress = trained.evaluations[-1].progress
        if progress < 1 and not trained.interrupted:
            self._print(f"training stopped at {100 * progress:.0f} %: no gain in the last evaluations; best state kept")

    def _print(self, line: str) -> None:
        self._bar.console.print(line, markup=False)

    def _start(self, phase: str, total: float, done: float = 0) -> None:
        """Replace the bar by that of another phase."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        else:
            self._bar.start()
        self._task = self._bar.add_task(phase, total=total, note="")
        self._done_at_start = done
        self._started = time.monotonic()
        self._advance(done)

    def _advance(self, done: float | None, note: str = "") -> None:
        """Show how much of the phase is done, None for no change, with notes after the bar."""
        if self._task is None:
            return
        self._bar.update(self._task, completed=done)
        task = self._bar.tasks[-1]
        notes = [note or f"{task.completed:.0f}/{task.total:.0f}"]
        if self._search is not None and self._search.best is not None:
            notes.append(f"{self._search.measured} measured")
            notes.append(f"best {self._search.best:.3f}× {self._search.basis}")
        notes += [self._measuring, self._time_left(task.completed, task.total or 0)]
        self._bar.update(self._task, note=" · ".join(part for part in notes if part))

    def _time_left(self, done: float, total: float) -> str:
        """The remaining time at the pace so far; a time limit may end a search earlier."""
        if not self._done_at_start < done < total:
            return ""
        elapsed = time.monotonic() - self._started
        left = elapsed / (done - self._done_at_start) * (total - done)
        if self._timeout is not None and self._bar.tasks[-1].description == _CANDIDATES:
            left = max(min(left, self._timeout - elapsed), 0)
        return f"about {duration(left)} left"


def format_agreement(agreement: Agreement) -> str:
    """How often the target's token is among the draft's best, as ``32.5 / 42.0 / 51.0 % (best 1 / 2 / 4)``.

    With draft heads, for each head, as ``32.5 / 42.0, 20.1 / 31.2 % (best 1 / 2, by head)``.
    """
    shares = ", ".join(" / ".join(f"{100 * share:.1f}" for share in top.values()) for top in agreement.by_place)
    return f"{shares} % (best {' / '.join(map(str, agreement.top))}{', by head' * bool(agreement.later)})"


@contextmanager
def step_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A transient progress bar on a terminal; the block receives a function that sets the number of steps done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)
