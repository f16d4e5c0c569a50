"""The search: an Optuna study over draft configurations, and the profile of the fastest one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from layerskip.checkpoints import cache_folder
from layerskip.costs import CostModel, DraftRoundCosts
from layerskip.drafting.config import DraftConfig
from layerskip.engine import Engine, measure_costs
from layerskip.errors import InvalidInputError
from layerskip.profile import DraftProfile, Provenance
from layerskip.utils import dtype_name, library_versions
from search.acceptance_tracer import AcceptanceTracer
from search.baseline import has_plain_weights, measure_transformers
from search.builder import DraftBuilder, fit_texts
from search.callbacks import (
    FinalistMeasured,
    HeldOutPromptMeasured,
    OnEvent,
    PhaseStarted,
    Progress,
    PromptMeasured,
    ReferenceDecoded,
    ReferenceReady,
    StudyOpened,
    TrialFinished,
    ignore,
)
from search.decoding_methods import PLAIN
from search.draft_layers import TrainedDraftLayer
from search.finalists import Finalist, best_at_full_precision, choose_finalists, measured_in_search
from search.machine_lock import MachineLock
from search.measure import (
    ExpectedSeconds,
    Measurement,
    MeasuringPlan,
    TimedRun,
    as_measured,
    as_record,
    describe_device,
    draft_bytes,
    measure_drafters,
    summarize,
)
from search.objective import Objective
from search.predict import SpeedupPredictor
from search.prompts import EncodedPrompt, SearchPrompts
from search.pruner import MeasuringPruner, is_to_be_measured
from search.reference import ReferenceRun
from search.samplers import DraftCosts, NoRepeats, make_sampler
from search.search_result import SearchResult
from search.search_task import SearchTask
from search.settings import SEEDS
from search.warm_starts import SingleSublayerAcceptance, WarmStartPlan, warm_starts
from studies.ranking import Snapshot, config_of, evaluated_trials, measured_trials
from studies.storage import ReconnectingStorage
from studies.study import COSTS_KEY, StudyContext, open_study
from studies.trial_loop import run_trials

# Each finalist decodes each held-out prompt so often, at different times: a busy moment rarely hits all.
_HELD_OUT_REPEATS = 2
# A controller that would cost more of the speedup on the search's own texts is left out of the profile.
_LEAST_SHARE_CONTROLLED = 0.98


@dataclass(frozen=True)
class Tools:
    """What predicts and builds candidates, made from reference texts and measured costs.

    Args:
        builder: Builds drafts.
        tracer: Traces their agreement with the target model on the scored texts.
        costs: What passes cost here.
        predictor: Predicts speedups.
    """

    builder: DraftBuilder
    tracer: AcceptanceTracer
    costs: CostModel
    predictor: SpeedupPredictor


class OtherWorkers(Protocol):
    """Other processes that work on the same study."""

    def check(self) -> None:
        """Report those that failed, each once."""


class Search:
    """Searches for the fastest draft of a model, and resumes where an earlier search of the same study stopped.

    Attributes:
        task: What it was made with.

    Args:
        engine: Runs the passes of the model.
        task: The prompts, the settings, the space and so on.
        storage: Where the study is kept.
        draft_layers: The trained draft layers that the space names, with their tensors.
        on_event: Called with what happens.
        other_workers: Makes of the task, with the study's name in it, the other workers, which are entered before the
            first trial and left after the last, such as :class:`search.workers.Workers`; None searches alone.

    Raises:
        InvalidInputError: The space names other draft layers than are given.
    """

    def __init__(
        self,
        engine: Engine,
        task: SearchTask,
        storage: ReconnectingStorage,
        *,
        draft_layers: Sequence[TrainedDraftLayer] = (),
        on_event: OnEvent = ignore,
        other_workers: Callable[[SearchTask], AbstractContextManager[OtherWorkers]] | None = None,
    ) -> None:
        named, given = task.space.draft_layers, tuple(layer.ref for layer in draft_layers)
        if named != given:
            raise InvalidInputError(
                f"space: names {len(named)} draft layers, and {len(given)} others were given; "
                "give the space those that the search gets"
            )
        self._engine = engine
        self.task = task
        self._storage = storage
        self._draft_layers = draft_layers
        self._on_event = on_event
        self._make_workers = other_workers
        self._folder = task.folder or cache_folder()
        self._lock = MachineLock(self._folder, engine.model.device, workers=task.settings.workers)
        self._prompts = SearchPrompts.of(task.prompts, task.settings)
        self._context = StudyContext(
            model=task.identity.id,
            fingerprint=task.identity.fingerprint,
            dtype=dtype_name(engine.model.dtype),
            device=describe_device(engine),
            prompts=task.prompts.fingerprint,
            max_new_tokens=task.settings.max_new_tokens,
            prompts_per_trial=len(self._prompts.measured),
            space=task.space.describe(),
        )
        self._plain_seconds: dict[str, float] = {}  # expected, by prompt
        self._plain_runs: dict[str, TimedRun] = {}  # the fastest so far, by prompt
        self._name = task.study or f"{_file_name(task.identity.id)}-{self._context.digest}"

    def run(self) -> SearchResult:
        """Search, measure the finalists on held-out prompts, and make the best one's profile.

        On Ctrl-C every finished trial is kept, and the profile is that of the best candidate measured so far.

        Raises:
            InvalidInputError: The study was made with another model, prompts or space.
            LosslessnessError: A draft changed the output.
        """
        study = self.open()
        tools, transformers, interrupted = None, None, False
        finalists: list[Finalist] = []
        try:
            tools = self.prepare(study)
            self.explore(study, tools)
            self._measure_finalists(study, tools, finalists)
        except KeyboardInterrupt:
            interrupted = True
        if finalists and not interrupted and has_plain_weights(self._engine.model):
            self._on_event(PhaseStarted("baseline"))
            length = self.task.settings.max_new_tokens
            transformers = measure_transformers(self._engine, self._prompts.held_out, length, self._lock)
        best = max(finalists or measured_in_search(study), key=lambda finalist: finalist.summary.speedup, default=None)
        shortfall = None
        if best and tools and best.summary.speedup <= 1 and not interrupted:
            with self._lock.shared():
                shortfall = tools.predictor.shortfall(config_of(best.trial))
        return SearchResult(
            study=study.study_name,
            trials=len(evaluated_trials(study)),
            measured=len(measured_trials(study)),
            profile=self._profile(best, tools) if best and tools else None,
            full_precision=best_at_full_precision(finalists, self.task.space),
            interrupted=interrupted,
            transformers=transformers,
            shortfall=shortfall,
        )

    def open(self) -> optuna.Study:
        """Create the study, or open it to resume.

        Raises:
            InvalidInputError: It was made with another model, prompts or space.
        """
        study = open_study(self._storage, self._name, self._context)
        self._on_event(StudyOpened(study.study_name, Progress.of(study)))
        return study

    def prepare(self, study: optuna.Study) -> Tools:
        """Decode the reference prompts and measure the parts of a step, or load what an earlier search kept.

        Args:
            study: Keeps the costs.

        Raises:
            LayerSkipError: The reference texts cannot be kept.
        """
        model, space, length = self._engine.model, self.task.space, self.task.settings.max_new_tokens
        scored, fitted = self._prompts.scored, self._prompts.fitted
        with self._lock.shared():  # another worker may be measuring
            self._on_event(PhaseStarted("reference", len(scored) + len(fitted)))
            reference = ReferenceRun(
                model,
                self._folder,
                self.task.identity.fingerprint,
                lambda done: self._on_event(ReferenceDecoded(done)),
            )
            builder = DraftBuilder(model, fit_texts(reference, fitted, max_new_tokens=length), self._draft_layers)
            tracer = AcceptanceTracer(model, reference.texts(scored, max_new_tokens=length))
            self._on_event(ReferenceReady(reference.found))
        costs = self._costs(study)
        predictor = SpeedupPredictor(self._engine, space, builder, tracer, costs, max_new_tokens=length)
        self._plain_seconds = dict(zip((prompt.id for prompt in scored), predictor.plain_seconds(), strict=True))
        return Tools(builder, tracer, costs, predictor)

    def explore(self, study: optuna.Study, tools: Tools) -> None:
        """Evaluate candidates until there are enough, and measure the promising ones.

        Args:
            study: From :meth:`open`.
            tools: From :meth:`prepare`.
        """
        settings = self.task.settings
        if len(evaluated_trials(study)) >= settings.trials and not is_to_be_measured(study):
            return
        study.sampler = self._sampler(study, tools)
        study.pruner = pruner = self._pruner(study, tools)
        objective = Objective(
            self.task.space,
            tools.predictor,
            partial(self._measure, tools.builder),
            self._lock,
            self._prompts.measured,
            settings.sampler_name,
        )
        plans: list[Callable[[optuna.Study, FrozenTrial], None]] = []
        if self.task.worker == 0:
            plans = [self._warm_starts(study, tools), pruner.revisit]
        ends = self.task.ends
        if ends is None and settings.timeout is not None:
            ends = time.monotonic() + settings.timeout
        self._on_event(PhaseStarted("trials"))
        with self._other_workers(replace(self.task, study=study.study_name, ends=ends)) as others:
            timeout = None if ends is None else ends - time.monotonic()
            for trial in run_trials(study, objective, self._storage.heartbeats, timeout=timeout):
                if others is not None:
                    others.check()
                for plan in plans:
                    plan(study, trial)
                now = Snapshot(study)
                progress = Progress.of(now)
                self._on_event(TrialFinished(trial, progress))
                is_planned = self.task.worker == 0 and is_to_be_measured(now)
                if progress.evaluated >= settings.trials and not is_planned:
                    break

    def _other_workers(self, task: SearchTask) -> AbstractContextManager[OtherWorkers | None]:
        return nullcontext() if self._make_workers is None else self._make_workers(task)

    def _costs(self, study: optuna.Study) -> CostModel:
        space = self.task.space
        try:
            kept = CostModel.from_json(study.user_attrs[COSTS_KEY])
            if set(space.precisions) <= set(kept.precisions):
                return kept
        except (KeyError, ValueError):  # the study is new, or kept another form
            pass
        self._on_event(PhaseStarted("costs"))
        with self._lock.exclusive():
            costs = measure_costs(
                self._engine,
                vocabularies=space.vocabulary_sizes,
                most_drafted=space.most_drafted,
                precisions=space.precisions,
            )
        study.set_user_attr(COSTS_KEY, costs.to_json())
        return costs

    def _sampler(self, study: optuna.Study, tools: Tools) -> BaseSampler:
        settings = self.task.settings
        # A resumed study, or another worker, must not draw the same random numbers again.
        drawn = len(study.get_trials(deepcopy=False)) + self.task.worker * settings.trials
        seed = None if settings.seed is None else (settings.seed + drawn) % SEEDS
        sampler = settings.sampler
        if isinstance(sampler, str):
            context = sum(len(prompt.tokens) for prompt in self._prompts.scored) / len(self._prompts.scored)
            draft_costs = DraftCosts(
                tools.costs.at(context).relative(), tools.builder.num_bridges, self.task.space.max_draft_length
            )
            sampler = make_sampler(sampler, self.task.space, draft_costs, seed=seed)
        elif self.task.worker:  # or this worker would draw what the first one draws
            sampler.reseed_rng()
        return NoRepeats(sampler, self.task.space, seed=seed)

    def _warm_starts(self, study: optuna.Study, tools: Tools) -> WarmStartPlan:
        """What enqueues warm starts after each trial, the first of them at once."""
        space, settings = self.task.space, self.task.settings
        alone = SingleSublayerAcceptance(self._engine.model, tools.tracer)
        starts = WarmStartPlan(
            warm_starts(space, alone, tools.tracer, tools.costs),
            alone,
            space,
            2 * settings.workers,  # a worker that finds none waiting would propose a candidate of its own
            settings.trials,
            self._lock,
        )
        starts(study)
        return starts

    def _pruner(self, study: optuna.Study, tools: Tools) -> MeasuringPruner:
        settings = self.task.settings
        # What a measurement would take if drafts neither helped nor hurt.
        tokens = settings.max_new_tokens * len(self._prompts.measured)
        seconds = 2 * tokens * tools.costs.at(settings.max_new_tokens).plain_step
        earlier = [trial.number for trial in study.get_trials(False)]
        return MeasuringPruner(settings.measuring_share, seconds, settings.trials, earlier)

    def _measure(
        self,
        builder: DraftBuilder,
        trial: int,
        config: DraftConfig,
        prompts: Sequence[EncodedPrompt],
        expected: ExpectedSeconds,
    ) -> Iterator[Measurement]:
        """Measure a trial's draft prompt by prompt; each measurement is recorded first."""
        self._on_event(PromptMeasured(0, len(prompts), trial))
        known = {prompt: [run] for prompt, run in self._plain_runs.items()}
        plain_seconds = self._plain_seconds | {prompt: run.seconds for prompt, run in self._plain_runs.items()}
        plan = MeasuringPlan(
            prompts,
            self.task.settings.max_new_tokens,
            expected={PLAIN: plain_seconds, "draft": expected},
            known_plain=known,
        )
        measured = measure_drafters(self._engine, {"draft": builder.drafter(config)}, plan, self._lock)
        for done, by_name in enumerate(measured, start=1):
            measurement, prompt = by_name["draft"], by_name["draft"].prompt
            if not measurement.disturbed:
                runs = [*measurement.plain, *known.get(prompt, ())]
                self._plain_runs[prompt] = min(runs, key=lambda run: run.seconds)
            self._storage.records.add(as_record(measurement, self._name, trial, "search"))
            self._on_event(PromptMeasured(done, len(prompts), trial))
            yield measurement

    def _measure_finalists(self, study: optuna.Study, tools: Tools, finalists: list[Finalist]) -> None:
        """Measure the best candidates on held-out prompts, in turn; on Ctrl-C, those measured on all of them count."""
        best = choose_finalists(study, self.task.settings.finalists, self.task.space)
        if not best:
            return
        costs = {trial.number: self._round_costs(config_of(trial), tools) for trial in best}
        self._on_event(PhaseStarted("finalists", len(self._prompts.held_out) * _HELD_OUT_REPEATS))
        drafters = {str(t.number): tools.builder.drafter(config_of(t), costs[t.number]) for t in best}
        plan = MeasuringPlan(self._prompts.held_out, self.task.settings.max_new_tokens, _HELD_OUT_REPEATS)
        measured: dict[str, Mapping[str, Measurement]] = {}
        try:
            for done, by_trial in enumerate(measure_drafters(self._engine, drafters, plan, self._lock), start=1):
                measured[next(iter(by_trial.values())).prompt] = by_trial
                self._on_event(HeldOutPromptMeasured(done))
        finally:
            if len(measured) == len(self._prompts.held_out):
                for trial in best:
                    of_trial = [by_trial[str(trial.number)] for by_trial in measured.values()]
                    for measurement in of_trial:
                        self._storage.records.add(as_record(measurement, self._name, trial.number, "held-out"))
                    finalists.append(Finalist(trial, summarize(of_trial), "held-out", costs[trial.number]))
        for finalist in finalists:
            self._on_event(FinalistMeasured(finalist.trial, finalist.summary.speedup))

    def _round_costs(self, config: DraftConfig, tools: Tools) -> DraftRoundCosts | None:
        """What rounds of a configuration cost, by which its drafting pauses; None where that would cost too much."""
        with self._lock.shared():  # another search may be measuring
            share = tools.predictor.controlled_share(config)
        return (
            tools.builder.round_costs(self._engine, config, tools.costs) if share >= _LEAST_SHARE_CONTROLLED else None
        )

    def _profile(self, best: Finalist, tools: Tools) -> DraftProfile:
        config, builder = config_of(best.trial), tools.builder
        weights = builder.weights(config)
        size = draft_bytes(self._engine.model, config, weights)
        length = self.task.settings.max_new_tokens
        return DraftProfile.of(
            config,
            weights,
            model=self.task.identity,
            measured=as_measured(best.summary, best.prompt_set, length, self._engine, draft_bytes=size),
            costs=best.costs,
            provenance=Provenance(
                study=self._name,
                trial=best.trial.number,
                created=datetime.now(UTC),
                tool=f"layerskip {library_versions()['layerskip']}",
                training_seconds=builder.training_seconds(config),
            ),
        )


def _file_name(id: str) -> str:
    """The last part of a model's id, fit for a study's name."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in id.rstrip("/").rpartition("/")[2]).lower()
