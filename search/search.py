"""The search: an Optuna study over what a draft leaves out, and the profile of the best candidate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from layerskip.checkpoints import cache_folder
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine, Engine
from layerskip.errors import InvalidInputError
from layerskip.fingerprint import ModelIdentity
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile, Measured, PromptSet, Provenance
from layerskip.utils import device_name, library_versions
from search.acceptance import AcceptanceTracer
from search.builder import DraftBuilder, fit_texts
from search.callbacks import (
    FinalistMeasured,
    OnEvent,
    PhaseStarted,
    Progress,
    PromptMeasured,
    ReferenceReady,
    StudyOpened,
    TrialFinished,
    ignore,
)
from search.draft_layers import TrainedDraftLayer
from search.latency import LatencyModel, measure_latency
from search.machine_lock import MachineLock
from search.measure import Measurement, MeasuringPlan, Summary, measure_drafter, summarize
from search.objective import COMPLETE_KEY, MEASURES_KEY, SECONDS_KEY, SOURCE_KEY, Objective, policy_of
from search.predict import SpeedupPredictor
from search.prompts import EncodedPrompt, PromptSplit
from search.reference import ReferenceRun
from search.relative_costs import RelativeCosts
from search.samplers import DraftChoices, NoRepeats, make_sampler
from search.settings import SEEDS, SearchSettings
from search.space import Candidate, Policy, SearchSpace
from search.warm_starts import SingleSublayerAcceptance, WarmStartPlan, warm_starts
from studies.ranking import (
    HasTrials,
    Snapshot,
    basis_of,
    best_trials,
    candidate_key,
    correction_of,
    finalists,
    fully_measured_trials,
    measured_trials,
    seen_trials,
    speedup_of,
)
from studies.records import MeasurementRecord
from studies.storage import ReconnectingStorage
from studies.study import LATENCY_KEY, StudyContext, open_study
from studies.trial_loop import run_trials


@dataclass(frozen=True)
class Finalist:
    """A candidate whose speed was measured.

    Args:
        trial: The trial that it comes from.
        summary: What was measured.
        prompt_set: On what.
    """

    trial: FrozenTrial
    summary: Summary
    prompt_set: PromptSet

    @classmethod
    def of(cls, trial: FrozenTrial) -> Finalist:
        """A measured trial with the figures that the search itself measured."""
        figures = {name: trial.user_attrs[name] for name in Summary.__dataclass_fields__}
        return cls(trial, Summary(**figures), "search")


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Args:
        study: The study's name.
        trials: Candidates that were looked at.
        measured: Candidates that were decoded for real.
        profile: The best candidate's profile; None if none was measured.
        interrupted: Whether Ctrl-C ended the search early.
    """

    study: str
    trials: int
    measured: int
    profile: DraftProfile | None
    interrupted: bool


def measured_part(summary: Summary, prompt_set: PromptSet, *, max_new_tokens: int, device: str, dtype: str) -> Measured:
    """Measurements as a profile tells them.

    Args:
        summary: What was measured.
        prompt_set: On what.
        max_new_tokens: Most tokens generated for each prompt.
        device: Name of the device.
        dtype: Name of the model's floating-point type.
    """
    figures = asdict(summary)
    figures["speculative_tokens_per_second"] = figures.pop("draft_tokens_per_second")
    return Measured(
        **figures,
        prompt_set=prompt_set,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        versions=library_versions(),
    )


def profile_of(
    best: Finalist,
    candidate: Candidate,
    weights: DraftWeights,
    identity: ModelIdentity,
    study: str,
    context: StudyContext,
    *,
    training_seconds: float | None = None,
) -> DraftProfile:
    """The profile of a measured candidate.

    Args:
        best: What was measured.
        candidate: What its trial tried.
        weights: Its stand-ins and vocabulary.
        identity: The model.
        study: The study's name.
        context: What the study's values depend on.
        training_seconds: How long its stand-in was trained, if it has one and that is known.
    """
    return DraftProfile.of(
        policy_of(best.trial).config(candidate.skip_set),
        weights,
        model=identity,
        measured=measured_part(
            best.summary,
            best.prompt_set,
            max_new_tokens=context.max_new_tokens,
            device=context.device,
            dtype=context.dtype,
        ),
        provenance=Provenance(
            study=study,
            trial=best.trial.number,
            created=datetime.now(UTC),
            tool=f"layerskip {library_versions()['layerskip']}",
            training_seconds=training_seconds,
        ),
    )


@dataclass(frozen=True)
class SearchPrompts:
    """Who decodes what.

    Args:
        scored: Drafts are held against the target model's continuations of these.
        fitted: Bridges and vocabularies learn from these; what they learned from would look better than it is.
        measured: Measured candidates decode these, the first of the scored ones.
        held_out: Finalists decode these.
    """

    scored: tuple[EncodedPrompt, ...]
    fitted: tuple[EncodedPrompt, ...]
    measured: tuple[EncodedPrompt, ...]
    held_out: tuple[EncodedPrompt, ...]

    @classmethod
    def of(cls, split: PromptSplit, settings: SearchSettings) -> SearchPrompts:
        """Half of the search's prompts are scored, or as many as are measured; with few prompts all do everything."""
        scored = max((len(split.search) + 1) // 2, settings.prompts_per_trial)
        return cls(
            split.search[:scored],
            split.search[scored:] or split.search,
            split.search[: settings.prompts_per_trial],
            split.held_out[: settings.held_out_prompts],
        )


@dataclass(frozen=True)
class Prepared:
    """What trials work with."""

    makers: DraftBuilder
    estimator: AcceptanceTracer
    latency: LatencyModel
    predictor: SpeedupPredictor


def prepare(
    engine: Engine,
    fingerprint: str,
    prompts: SearchPrompts,
    space: SearchSpace,
    settings: SearchSettings,
    study: optuna.Study,
    *,
    stand_ins: Sequence[TrainedDraftLayer] = (),
    folder: Path,
    quiet: MachineLock,
    on_event: OnEvent,
) -> Prepared:
    """Make the reference run and measure the parts of a step, or take those that an earlier search made.

    Args:
        engine: Runs the passes of the model.
        fingerprint: Of its weights.
        prompts: Who decodes what.
        space: What candidates are made of.
        settings: How long texts are.
        study: Keeps what the parts of a step cost.
        stand_ins: Trained ones that candidates may have.
        folder: Where reference runs are kept.
        quiet: Gives measurements the machine for themselves.
        on_event: Called with what happens.

    Raises:
        LayerSkipError: The reference run cannot be kept.
    """
    model, length = engine.model, settings.max_new_tokens
    with quiet.shared():  # another worker may be measuring
        run = ReferenceRun(model, folder, fingerprint)
        on_event(PhaseStarted("reference", len(prompts.scored) + len(prompts.fitted)))
        makers = DraftBuilder(model, fit_texts(run, prompts.fitted, max_new_tokens=length), stand_ins)
        estimator = AcceptanceTracer(model, run.texts(prompts.scored, max_new_tokens=length))
        on_event(ReferenceReady(run.found))
    latency = _latency(engine, space, study, quiet, on_event)
    predictor = SpeedupPredictor(engine, space, makers, estimator, latency, max_new_tokens=length)
    return Prepared(makers, estimator, latency, predictor)


def _latency(
    engine: Engine, space: SearchSpace, study: optuna.Study, quiet: MachineLock, on_event: OnEvent
) -> LatencyModel:
    try:
        return LatencyModel.from_json(study.user_attrs[LATENCY_KEY])
    except (KeyError, ValidationError):  # the study is new, or kept another form
        on_event(PhaseStarted("costs"))
    with quiet.exclusive():
        latency = measure_latency(engine, space)
    study.set_user_attr(LATENCY_KEY, latency.as_json())
    return latency


def next_to_measure(study: HasTrials) -> FrozenTrial | None:
    """The candidate of the highest prediction that was not measured yet and could beat the best that was."""
    measured = measured_trials(study)
    done = {candidate_key(trial) for trial in measured}
    open_ones = [t for t in seen_trials(study) if t.user_attrs[COMPLETE_KEY] and candidate_key(t) not in done]
    best = max(open_ones, key=speedup_of, default=None)
    to_beat = max(map(speedup_of, fully_measured_trials(study)), default=0.0)
    return best if best is not None and speedup_of(best) * correction_of(study) > to_beat else None


class MeasurementScheduler:
    """A callback for a study: enqueues what is worth measuring, as far as there is time for it.

    Args:
        share: Most of the search's time that may go into measuring, from 0 to 1.
        seconds: What one measurement is expected to take.
        earlier: Numbers of the trials that were measured before this search began.
    """

    def __init__(self, share: float, seconds: float, earlier: Collection[int]) -> None:
        self._share = share
        self._seconds = seconds
        self._earlier = earlier
        self._began = time.perf_counter()

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        now = Snapshot(study)
        if _busy(now) or not self._has_time(now):
            return
        best = next_to_measure(now)
        if best is not None:
            attributes = {SOURCE_KEY: f"measurement of trial {best.number}", MEASURES_KEY: best.number}
            study.enqueue_trial(best.params, user_attrs=attributes, skip_if_exists=False)

    def _has_time(self, study: HasTrials) -> bool:
        measured = measured_trials(study)
        spent = [trial.user_attrs[SECONDS_KEY] for trial in measured if trial.number not in self._earlier]
        one = statistics.median(spent) if spent else self._seconds
        elapsed = time.perf_counter() - self._began
        return float(sum(spent) + one) <= self._share * (elapsed + one)


def _busy(study: HasTrials) -> bool:
    """Whether a measurement is under way, or would only queue up behind others: till then there may be a better one."""
    waiting, running = TrialState.WAITING, TrialState.RUNNING
    open_trials = study.get_trials(deepcopy=False, states=(waiting, running))
    return any(trial.state == waiting or MEASURES_KEY in trial.user_attrs for trial in open_trials)


# Seconds; no timeout at all would be another thing.
_MOMENT = 1e-3


class Search:
    """Finds a draft for a model, and goes on where an earlier search of the same study stopped.

    Args:
        engine: Runs the passes of the model.
        identity: Its identity.
        prompts: What to decode.
        storage: Where the study lives.
        settings: How long and how thoroughly to search.
        space: What to choose among; None is the skip set, when drafts end, and the stand-ins.
        stand_ins: The trained ones that the space names, with their tensors.
        study_name: The study's name; None makes one of the model's id and of all that values depend on, so that the
            same search finds its study again and another search gets another one.
        on_event: Called with what happens.
        folder: Where reference runs are kept; None is :func:`layerskip.checkpoints.cache_folder`.
        ends: Time on the machine's monotonic clock from which on no trial starts; None leaves it to the settings.
        number: Of this worker, where several work on one study; 0 plans what is measured.
        helpers: Given the study's name, makes what is entered before the first trial and left behind the last, such as
            :class:`search.workers.Workers`.

    Raises:
        InvalidInputError: The study's name is empty, or the space names other stand-ins than were given.
    """

    def __init__(
        self,
        engine: Engine,
        identity: ModelIdentity,
        prompts: PromptSplit,
        storage: ReconnectingStorage,
        settings: SearchSettings,
        *,
        space: SearchSpace | None = None,
        stand_ins: Sequence[TrainedDraftLayer] = (),
        study_name: str | None = None,
        on_event: OnEvent = ignore,
        folder: Path | None = None,
        ends: float | None = None,
        number: int = 0,
        helpers: Callable[[str], AbstractContextManager[object]] = lambda study: nullcontext(),
    ) -> None:
        if study_name is not None and not study_name.strip():
            raise InvalidInputError("study: the name is empty; leave --study out for a name made of the search itself")
        model = engine.model
        self._engine = engine
        self._identity = identity
        self._storage = storage
        self._settings = settings
        self._on_event = on_event
        self._prompts = SearchPrompts.of(prompts, settings)
        names = tuple(one.name for one in stand_ins)
        self._space = space or SearchSpace(model.num_layers, stand_ins=names)
        if self._space.stand_ins != names:
            raise InvalidInputError(
                f"space: names {len(self._space.stand_ins)} trained stand-ins, and {len(names)} others were given; "
                "give the space those that the search gets"
            )
        self._stand_ins = stand_ins
        self._folder = folder or cache_folder()
        self._quiet = MachineLock(self._folder, model.device, workers=settings.workers)
        self._number = number
        self._ends = ends
        self._helpers = helpers
        self._prepared: Prepared | None = None
        self._context = StudyContext(
            model=identity.id,
            fingerprint=identity.fingerprint,
            dtype=_dtype_name(model),
            device=_device_name(engine),
            prompts=prompts.fingerprint,
            max_new_tokens=settings.max_new_tokens,
            prompts_per_trial=len(self._prompts.measured),
            space=self._space.describe(),
        )
        self._name = study_name or f"{_file_name(identity.id)}-{self._context.digest}"

    def run(self) -> SearchResult:
        """Search, measure the finalists on held-out prompts, and make the best one's profile.

        On Ctrl-C every finished trial is kept, and the profile is that of the best candidate measured so far.

        Raises:
            InvalidInputError: The study was made with another model, prompts or space.
            LosslessnessError: A draft changed the output.
        """
        study = self.open()
        interrupted = False
        decided: list[Finalist] = []
        try:
            self.explore(study)
            chosen = finalists(study, self._settings.finalists)
            self._on_event(PhaseStarted("finalists", len(chosen)))
            for trial in chosen:
                decided.append(self._measure_finalist(trial))
                self._on_event(FinalistMeasured(len(decided), trial, decided[-1].summary.speedup))
        except KeyboardInterrupt:
            interrupted = True
        so_far = max(fully_measured_trials(study), key=speedup_of, default=None)
        best = max(decided, key=lambda one: one.summary.speedup, default=Finalist.of(so_far) if so_far else None)
        return SearchResult(
            study=study.study_name,
            trials=len(seen_trials(study)),
            measured=len(measured_trials(study)),
            profile=self._profile(best) if best and self._prepared else None,
            interrupted=interrupted,
        )

    def open(self) -> optuna.Study:
        """Create the study, or open it to go on.

        Raises:
            InvalidInputError: It was made with another model, prompts or space.
        """
        study = open_study(self._storage, self._name, self._context)
        self._on_event(StudyOpened(study.study_name, progress_of(study)))
        return study

    def explore(self, study: optuna.Study) -> None:
        """Look at candidates until there are enough, and measure those that look promising."""
        tools = self._prepare(study)
        if len(seen_trials(study)) >= self._settings.trials:
            return
        study.sampler = self._sampler(study, tools)
        objective = Objective(
            self._space,
            tools.predictor,
            tools.makers,
            partial(self._measure, prompt_set="search"),
            self._quiet,
            self._prompts.measured,
            self._settings.sampler,
        )
        callbacks: list[Callable[[optuna.Study, FrozenTrial], None]] = []
        if self._number == 0:
            earlier = [trial.number for trial in measured_trials(study)]
            alone = SingleSublayerAcceptance(self._engine.model, tools.estimator)
            starts = WarmStartPlan(
                warm_starts(self._space, alone, tools.estimator, tools.latency),
                alone,
                self._space,
                2 * self._settings.workers,  # a worker that finds none waiting would propose one of its own
                self._quiet,
            )
            starts(study)
            measuring = MeasurementScheduler(self._settings.measuring_share, self._seconds_to_measure(tools), earlier)
            callbacks = [starts, measuring]
        self._on_event(PhaseStarted("trials"))
        with self._helpers(study.study_name):
            for trial in run_trials(study, objective, self._storage.heartbeats, timeout=self._timeout()):
                for callback in callbacks:
                    callback(study, trial)
                progress = progress_of(Snapshot(study))
                self._on_event(TrialFinished(trial, progress))
                if progress.seen >= self._settings.trials:
                    break

    def _timeout(self) -> float | None:
        return self._settings.timeout if self._ends is None else max(self._ends - time.monotonic(), _MOMENT)

    def _prepare(self, study: optuna.Study) -> Prepared:
        self._prepared = prepare(
            self._engine,
            self._identity.fingerprint,
            self._prompts,
            self._space,
            self._settings,
            study,
            stand_ins=self._stand_ins,
            folder=self._folder,
            quiet=self._quiet,
            on_event=self._on_event,
        )
        return self._prepared

    def _sampler(self, study: optuna.Study, tools: Prepared) -> BaseSampler:
        # A resumed study, or another worker, must not draw the same random numbers again.
        drawn = len(study.get_trials(deepcopy=False)) + self._number * self._settings.trials
        seed = None if self._settings.seed is None else (self._settings.seed + drawn) % SEEDS
        space = self._space
        exits = tuple(one.start for one in space.stand_ins)
        choices = DraftChoices(tuple(space.bit_names()), space.bridges, space.vocabularies, exits)
        context = sum(len(prompt.tokens) for prompt in self._prompts.scored) / len(self._prompts.scored)
        costs = RelativeCosts(tools.latency, tools.makers, context, self._engine.costs, space.stand_ins)
        return NoRepeats(
            make_sampler(
                self._settings.sampler,
                choices=choices,
                costs=costs,
                max_draft_length=space.max_draft_length,
                seed=seed,
            ),
            choices,
            seed=seed,
        )

    def _measure(
        self,
        trial: int,
        candidate: Candidate,
        policy: Policy,
        prompts: Sequence[EncodedPrompt],
        *,
        prompt_set: PromptSet,
    ) -> Iterator[Measurement]:
        """Measure a trial's candidate prompt by prompt; each measurement is recorded before it is given."""
        assert self._prepared is not None
        self._on_event(PromptMeasured(0, len(prompts), trial))
        drafter = self._prepared.makers.drafter(candidate, policy)
        plan = MeasuringPlan(prompts, self._settings.max_new_tokens)
        records = self._storage.records
        for number, measured in enumerate(measure_drafter(self._engine, drafter, plan, self._quiet), start=1):
            records.add(_record(measured, self._name, trial, prompt_set))
            self._on_event(PromptMeasured(number, len(prompts), trial))
            yield measured

    def _seconds_to_measure(self, tools: Prepared) -> float:
        """What a measurement would take if drafts neither helped nor hurt."""
        tokens = self._settings.max_new_tokens * len(self._prompts.measured)
        return 2 * tokens * tools.latency.verification(1, 0.0, self._settings.max_new_tokens, None)

    def _measure_finalist(self, trial: FrozenTrial) -> Finalist:
        assert self._prepared is not None
        candidate, policy = self._space.candidate(trial.params), policy_of(trial)
        measured = self._measure(trial.number, candidate, policy, self._prompts.held_out, prompt_set="held-out")
        return Finalist(trial, summarize(list(measured)), "held-out")

    def _profile(self, best: Finalist) -> DraftProfile:
        assert self._prepared is not None
        candidate = self._space.candidate(best.trial.params)
        makers = self._prepared.makers
        return profile_of(
            best,
            candidate,
            makers.assets(candidate),
            self._identity,
            self._name,
            self._context,
            training_seconds=makers.training_seconds(candidate),
        )


def progress_of(study: HasTrials) -> Progress:
    """Where a search stands."""
    best = best_trials(study, 1)
    return Progress(
        seen=len(seen_trials(study)),
        measured=len(measured_trials(study)),
        best=speedup_of(best[0]) if best else None,
        basis=basis_of(best[0]) if best else "predicted",
    )


def _record(measured: Measurement, study: str, trial: int, prompt_set: PromptSet) -> MeasurementRecord:
    return MeasurementRecord(
        study=study,
        trial=trial,
        prompt=measured.prompt,
        prompt_set=prompt_set,
        plain_seconds=measured.plain_seconds,
        draft_seconds=measured.draft_seconds,
        tokens=measured.tokens,
        draft_tokens=measured.draft_tokens,
        drafted=measured.drafted,
        accepted=measured.accepted,
        near_tie=measured.near_tie,
    )


def _device_name(engine: Engine) -> str:
    """The device, and how passes run there if it is not the usual way."""
    ways = [device_name(engine.model.device)]
    ways += [engine.name] * (engine.name != EagerEngine.name)
    ways += ["compiled"] * engine.model.compiled
    return ", ".join(ways)


def _dtype_name(model: LayerSkipModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _file_name(id: str) -> str:
    """The last part of a model's id, fit for a study's name."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in id.rstrip("/").rpartition("/")[2]).lower()
