"""What ``layerskip tune`` works with: the model and the prompts that were named, and its progress on the terminal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from cli.common import (
    check_writable,
    stderr,
)
from layerskip import DraftProfile, load_checkpoint
from layerskip.checkpoints import cache_folder
from layerskip.engine import Engine
from layerskip.fingerprint import ModelIdentity, identify
from layerskip.tokenizer import read_prompts
from layerskip.training import Agreement, EvalResult
from layerskip.utils import duration
from search.callbacks import (
    Evaluated,
    Event,
    PhaseStarted,
    PolicyChosen,
    PromptMeasured,
    TextsWritten,
    TrainingEnded,
    TrainingStarted,
)
from search.loading import engine_of
from search.prompts import PromptSplit, built_in_prompts, split_prompts
from search.train_draft import TuningSettings, exit_of

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class TuneInputs:
    """What was named on the command line."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity
    split: PromptSplit
    settings: TuningSettings
    folder: Path


def checked_settings(out: Path, **values: Any) -> TuningSettings:
    """The settings, when it is also clear that the profile can be written.

    Raises:
        InvalidInputError: It cannot, or a value is out of its range.
    """
    check_writable(out)
    return TuningSettings(**values)


def opened(
    source: str,
    prompts: Path | None,
    settings: TuningSettings,
    *,
    device: str,
    dtype: str,
    engine: str,
    compiled: bool,
) -> TuneInputs:
    """Load the model, or that of a profile, whose exit and draft vocabulary are then taken where none are given.

    Raises:
        LayerSkipError: Something cannot be used as it is.
    """
    profile = DraftProfile.load(source) if source.endswith(".json") else None
    if profile is not None:
        settings = replace(
            settings,
            exit=None if settings.drafts_with_heads else settings.exit or exit_of(profile.skip_set),
            vocabulary=_vocabulary(profile) if settings.vocabulary is None else settings.vocabulary,
        )
    chosen = read_prompts(prompts) if prompts else built_in_prompts()
    name = profile.model.id if profile else source
    stderr.print(f"loading {name}")
    checkpoint = load_checkpoint(name, device=device, dtype=dtype)
    runner = engine_of(checkpoint.model, engine, compiled)
    model = runner.model
    if profile is not None:
        profile.check(model)
    split = split_prompts(
        chosen,
        checkpoint.tokenizer,
        max_new_tokens=max(settings.max_new_tokens, settings.answer_tokens if prompts else 0),
        context_length=model.context_length,
    )
    return TuneInputs(runner, checkpoint.tokenizer, identify(model, checkpoint.source), split, settings, cache_folder())


def _vocabulary(profile: DraftProfile) -> int | None:
    return profile.tensors.vocabulary if profile.tensors is not None else None


def in_percent(agreement: Agreement) -> str:
    """The target model's choice among the draft's best tokens, as ``32.5 / 42.0 / 51.0 % (best 1 / 2 / 4)``.

    Of draft heads, for each of them, as ``32.5 / 42.0, 20.1 / 31.2 % (best 1 / 2, by head)``.
    """
    shares = ", ".join(" / ".join(f"{100 * share:.1f}" for share in top.values()) for top in agreement.by_place)
    return f"{shares} % (best {' / '.join(map(str, agreement.top))}{', by head' * bool(agreement.later)})"


class TuningProgress:
    """A progress bar on stderr, and a line for every look at the held-out texts."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
            console=stderr,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __enter__(self) -> TuningProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._task is not None:  # a bar that never showed anything would leave an empty line in a log
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case PhaseStarted("texts"):
                self._say("the model writes texts to learn from; those that it wrote earlier are used again")
                self._start("positions", event.total)
            case TextsWritten():
                self._show(event.positions, f"{event.positions}")
            case TrainingStarted():
                self._say(
                    f"training on {event.positions} positions, drafts of {event.vocabulary} tokens; held-out agreement:"
                )
                self._start("training", 1)
            case Evaluated():
                self._evaluated(event.result, event.ideal)
            case TrainingEnded():
                progress = event.trained.evaluations[-1].progress
                if progress < 1 and not event.trained.interrupted:
                    self._say(
                        f"training ends at {100 * progress:.0f} %: the last looks gained nothing; "
                        "the best state is kept"
                    )
            case PhaseStarted("costs"):
                self._say("measuring what the parts of a step cost here")
            case PolicyChosen():
                self._say(f"predicted {event.predicted:.3f}× with draft {event.config.details}")
                self._start("prompts", 1)
            case PromptMeasured():
                self._show(event.done / event.total, f"{event.done}/{event.total}")

    def _evaluated(self, look: EvalResult, ideal: float) -> None:
        left = "" if look.seconds_left is None else f", {duration(look.seconds_left)} left"
        self._say(
            f"{100 * look.progress:3.0f} %  {in_percent(look.agreement)}, loss {look.agreement.loss:.3f}, "
            f"ideal speedup {ideal:.2f}×{left}"
        )
        self._show(look.progress, f"{100 * look.agreement.top[1]:.1f} %{left}")

    def _say(self, line: str) -> None:
        self._bar.console.print(line, markup=False)

    def _start(self, phase: str, total: float) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        else:
            self._bar.start()
        self._task = self._bar.add_task(phase, total=total, note="")

    def _show(self, done: float, note: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
