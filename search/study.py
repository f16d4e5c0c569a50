"""The search: an Optuna study whose value is the measured speedup, and the profile of the best candidate."""

from __future__ import annotations

import random
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import WilcoxonPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from layerskip.decoding.draft_exit import FixedLength
from layerskip.decoding.drafting import SkipDrafter
from layerskip.decoding.loop import generate
from layerskip.drafts.assets import DraftAssets
from layerskip.engine import EagerEngine
from layerskip.errors import InvalidInputError
from layerskip.identity import ModelIdentity
from layerskip.machine import device_name, library_versions
from layerskip.profile import DraftProfile, Measured, PromptSet, Provenance
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from search.measure import PromptMeasurement, Summary, measure_prompt, summarize
from search.prompts import EncodedPrompt, PromptSplit
from search.reference import Reference, drafter_of
from search.space import Candidate, SearchSpace
from search.starts import starting_points
from studies.records import MeasurementRecord, add_measurement
from studies.study import StudyContext, best_trials, completed_trials, open_study

SOURCE_KEY = "source"
# Enough that every kernel and buffer has been used once.
_WARM_UP_TOKENS = 8
# The starting points give TPE enough to go by; random skip sets leave out half of the model and teach little.
_RANDOM_TRIALS = 5
# Optuna's samplers take seeds below this.
_SEEDS = 2**32


@dataclass(frozen=True)
class SearchSettings:
    """How long and how thoroughly to search.

    Args:
        trials: Completed trials that the study shall have in the end.
        timeout: Seconds after which no new trial starts; None for no limit. Finalists are measured afterwards.
        max_new_tokens: Tokens to generate for each prompt.
        prompts_per_trial: Prompts that a trial decodes; a hopeless trial stops earlier.
        finalists: Best candidates to measure again on held-out prompts.
        held_out_prompts: Most held-out prompts to measure each finalist on.
        seed: Makes the proposals repeatable (measured speeds never are).

    Raises:
        InvalidInputError: A number is out of its range.
    """

    trials: int = 30
    timeout: float | None = None
    max_new_tokens: int = 48
    prompts_per_trial: int = 6
    finalists: int = 3
    held_out_prompts: int = 16
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "max_new_tokens", "prompts_per_trial", "finalists", "held_out_prompts"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidInputError(f"timeout: expected a number of seconds above 0, got {self.timeout}")
        if self.seed is not None and not 0 <= self.seed < _SEEDS:
            raise InvalidInputError(f"seed: expected a whole number from 0 to {_SEEDS - 1}, got {self.seed}")


class SearchObserver:
    """Told how a search goes. Does nothing; override what you want to know."""

    def study_opened(self, name: str, completed: int) -> None:
        """The study is open, with so many trials completed earlier."""

    def reference_begins(self, prompts: int) -> None:
        """The full model will decode so many prompts for drafts to learn from."""

    def trials_begin(self) -> None:
        """Warm-up and reference run are over."""

    def prompt_measured(self, number: int, total: int) -> None:
        """A trial or a finalist has decoded ``number`` of ``total`` prompts."""

    def trial_finished(self, completed: int, trial: FrozenTrial, best: float | None) -> None:
        """A trial ended; ``completed`` have a value, the highest is ``best``."""

    def finalists_chosen(self, count: int) -> None:
        """The search is over, and so many candidates will be measured on held-out prompts."""

    def finalist_measured(self, number: int, trial: FrozenTrial, speedup: float) -> None:
        """A finalist, the ``number``-th, was measured."""


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Args:
        study: The study's name.
        trials: Completed trials in it.
        profile: The best candidate's profile; None if no trial was completed.
        interrupted: Whether Ctrl-C ended the search early.
    """

    study: str
    trials: int
    profile: DraftProfile | None
    interrupted: bool


@dataclass(frozen=True)
class _Finalist:
    """A candidate whose speed was measured."""

    trial: FrozenTrial
    summary: Summary
    prompt_set: PromptSet


class Search:
    """Finds a skip set and a draft exit for a model, and goes on where an earlier search of the same study stopped.

    Args:
        model: The model.
        identity: Its identity.
        prompts: What to decode.
        storage: Where the study lives.
        settings: How long and how thoroughly to search.
        space: What to choose among; None is the skip set and the draft exit alone.
        study_name: The study's name; None makes one of the model's id and of all that measured values depend on, so
            that the same search finds its study again and another search gets another one.
        observer: Told how it goes.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        identity: ModelIdentity,
        prompts: PromptSplit,
        storage: RDBStorage,
        settings: SearchSettings,
        *,
        space: SearchSpace | None = None,
        study_name: str | None = None,
        observer: SearchObserver | None = None,
    ) -> None:
        if study_name is not None and not study_name.strip():
            raise InvalidInputError("study: the name is empty; leave --study out for a name made of the search itself")
        self._model = model
        self._identity = identity
        self._storage = storage
        self._settings = settings
        self._observer = observer or SearchObserver()
        # Not those that trials decode: bridges and vocabulary fitted to these would look better than they are.
        self._reference_prompts = prompts.search[settings.prompts_per_trial :] or prompts.search
        self._search_prompts = prompts.search[: settings.prompts_per_trial]
        self._held_out = prompts.held_out[: settings.held_out_prompts]
        self._space = space or SearchSpace(model.num_layers)
        self._reference: Reference | None = None
        self._context = StudyContext(
            model=identity.id,
            fingerprint=identity.fingerprint,
            dtype=_dtype_name(model),
            device=_device_name(model),
            prompts=prompts.fingerprint,
            max_new_tokens=settings.max_new_tokens,
            prompts_per_trial=len(self._search_prompts),
            space=self._space.describe(),
        )
        self._name = study_name or f"{_file_name(identity.id)}-{self._context.digest}"

    def run(self) -> SearchResult:
        """Search, measure the finalists on held-out prompts, and make the best one's profile.

        On Ctrl-C every completed trial is kept, and the profile is that of the best candidate so far.

        Raises:
            InvalidInputError: The study was made with another model, prompts or space.
            LosslessnessError: A draft changed the output.
        """
        study = self._open_study()
        interrupted = False
        finalists: list[_Finalist] = []
        try:
            self._warm_up()
            if self._space.needs_reference:
                self._observer.reference_begins(len(self._reference_prompts))
                self._reference = Reference(
                    self._model, self._reference_prompts, max_new_tokens=self._settings.max_new_tokens
                )
            self._optimize(study)
            chosen = best_trials(study, self._settings.finalists)
            self._observer.finalists_chosen(len(chosen))
            for trial in chosen:
                finalists.append(self._measure_finalist(trial))
                self._observer.finalist_measured(len(finalists), trial, finalists[-1].summary.speedup)
        except KeyboardInterrupt:
            interrupted = True
        best = max(finalists, key=lambda finalist: finalist.summary.speedup, default=self._best_so_far(study))
        if self._space.needs_reference and self._reference is None:  # interrupted before it: no tensors to save
            best = None
        return SearchResult(
            study=study.study_name,
            trials=len(completed_trials(study)),
            profile=self._profile(best) if best else None,
            interrupted=interrupted,
        )

    def _open_study(self) -> optuna.Study:
        study = open_study(self._storage, self._name, self._context)
        trials = len(study.get_trials(deepcopy=False))
        # A resumed study must not draw the same random numbers again.
        seed = None if self._settings.seed is None else (self._settings.seed + trials) % _SEEDS
        study.sampler = TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.pruner = WilcoxonPruner()
        for source, candidate in starting_points(self._space):
            study.enqueue_trial(self._space.parameters(candidate), user_attrs={SOURCE_KEY: source}, skip_if_exists=True)
        self._observer.study_opened(study.study_name, len(completed_trials(study)))
        return study

    def _warm_up(self) -> None:
        nothing_skipped = Candidate(SkipSet(self._model.num_layers), FixedLength())
        for drafter in (None, self._drafter(nothing_skipped)):
            generate(self._model, self._search_prompts[0].tokens, drafter=drafter, max_new_tokens=_WARM_UP_TOKENS)

    def _optimize(self, study: optuna.Study) -> None:
        if len(completed_trials(study)) >= self._settings.trials:
            return
        self._observer.trials_begin()
        enough = MaxTrialsCallback(self._settings.trials, states=(TrialState.COMPLETE,))
        try:
            study.optimize(self._evaluate, timeout=self._settings.timeout, callbacks=[self._report, enough])
        except UnboundLocalError as error:  # Optuna's own, when Ctrl-C falls into its storing of a trial
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise

    def _report(self, study: optuna.Study, trial: FrozenTrial) -> None:
        best = best_trials(study, 1)
        self._observer.trial_finished(len(completed_trials(study)), trial, best[0].value if best else None)

    def _evaluate(self, trial: optuna.Trial) -> float:
        """The objective: the measured speedup of what the trial chose."""
        try:
            return self._value(trial)
        except KeyboardInterrupt:
            study_goes_on_with = {SOURCE_KEY: trial.user_attrs.get(SOURCE_KEY, f"interrupted trial {trial.number}")}
            # An enqueued trial that was interrupted while it chose has chosen in part only.
            chosen = trial.study.trials[trial.number].system_attrs.get("fixed_params", trial.params)
            trial.study.enqueue_trial(chosen, user_attrs=study_goes_on_with)
            raise

    def _value(self, trial: optuna.Trial) -> float:
        try:
            candidate = self._space.suggest(trial)
        except InvalidInputError as error:  # every sublayer skipped
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("skip_set", str(candidate.skip_set))
        trial.set_user_attr("draft_exit", candidate.draft)
        summary = summarize(self._measure_trial(trial, candidate))
        for name, value in asdict(summary).items():
            trial.set_user_attr(name, value)
        return summary.speedup

    def _measure_trial(self, trial: optuna.Trial, candidate: Candidate) -> list[PromptMeasurement]:
        """Measure prompts in random order until all are done or the pruner sees no hope.

        A hopeless trial keeps the speedup of the prompts that it did: pruned, it would have that of its last alone.
        """
        order = list(enumerate(self._search_prompts))
        random.Random(trial.number).shuffle(order)
        drafter = self._ready_drafter(candidate)
        measured: list[PromptMeasurement] = []
        for step, prompt in order:
            measured.append(self._measure(trial.number, prompt, "search", drafter, len(measured)))
            self._observer.prompt_measured(len(measured), len(order))
            trial.report(measured[-1].speedup, step)
            if len(measured) < len(order) and trial.should_prune():
                trial.set_user_attr("stopped_early", True)
                break
        return measured

    def _measure_finalist(self, trial: FrozenTrial) -> _Finalist:
        drafter = self._ready_drafter(self._space.candidate(trial.params))
        measured: list[PromptMeasurement] = []
        for prompt in self._held_out:
            measured.append(self._measure(trial.number, prompt, "held-out", drafter, len(measured)))
            self._observer.prompt_measured(len(measured), len(self._held_out))
        return _Finalist(trial, summarize(measured), "held-out")

    def _measure(
        self, trial: int, prompt: EncodedPrompt, prompt_set: PromptSet, drafter: SkipDrafter, number: int
    ) -> PromptMeasurement:
        measurement = measure_prompt(
            self._model,
            prompt,
            drafter,
            max_new_tokens=self._settings.max_new_tokens,
            plain_first=number % 2 == 0,
        )
        record = MeasurementRecord(study=self._name, trial=trial, prompt_set=prompt_set, **asdict(measurement))
        add_measurement(self._storage.engine, record)
        return measurement

    def _drafter(self, candidate: Candidate) -> SkipDrafter:
        return drafter_of(self._model, candidate, self._assets(candidate))

    def _ready_drafter(self, candidate: Candidate) -> SkipDrafter:
        """A candidate's drafter; where passes are captured, that is done, and not part of what is measured."""
        drafter = self._drafter(candidate)
        if self._model.engine.captures:
            for prompt in self._search_prompts:
                generate(self._model, prompt.tokens, drafter=drafter, max_new_tokens=self._settings.max_new_tokens)
        return drafter

    def _assets(self, candidate: Candidate) -> DraftAssets:
        return self._reference.assets(candidate) if self._reference is not None else DraftAssets()

    def _best_so_far(self, study: optuna.Study) -> _Finalist | None:
        """The best trial with the figures that the search itself measured."""
        for trial in best_trials(study, 1):
            figures = {name: trial.user_attrs[name] for name in Summary.__dataclass_fields__}
            return _Finalist(trial, Summary(**figures), "search")
        return None

    def _profile(self, best: _Finalist) -> DraftProfile:
        candidate = self._space.candidate(best.trial.params)
        summary = asdict(best.summary)
        summary["speculative_tokens_per_second"] = summary.pop("draft_tokens_per_second")
        versions = library_versions()
        profile = DraftProfile(
            model=self._identity,
            skip_set=candidate.skip_set,
            draft_exit=candidate.draft_exit,
            gate=candidate.gate,
            measured=Measured(
                **summary,
                prompt_set=best.prompt_set,
                max_new_tokens=self._settings.max_new_tokens,
                device=self._context.device,
                dtype=self._context.dtype,
                versions=versions,
            ),
            provenance=Provenance(
                study=self._name,
                trial=best.trial.number,
                created=datetime.now(UTC),
                tool=f"layerskip {versions['layerskip']}",
            ),
        )
        return profile.with_assets(self._assets(candidate))


def _device_name(model: LayerSkipModel) -> str:
    """The device, and how passes run there if it is not the usual way."""
    name = device_name(model.device)
    return name if model.engine.name == EagerEngine.name else f"{name}, {model.engine.name}"


def _dtype_name(model: LayerSkipModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _file_name(id: str) -> str:
    """The last part of a model's id, fit for a study's name."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in id.rstrip("/").rpartition("/")[2]).lower()
