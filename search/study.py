"""The search: an Optuna study over what a draft leaves out, and the profile of the best candidate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from layerskip.checkpoints import cache_folder
from layerskip.engine import EagerEngine
from layerskip.errors import InvalidInputError
from layerskip.identity import ModelIdentity
from layerskip.machine import device_name
from layerskip.profile import DraftProfile
from layerskip.stack.model import LayerSkipModel
from search.measure import summarize
from search.measurer import Measurer
from search.observer import Progress, SearchObserver
from search.outcome import Finalist, SearchResult, profile_of
from search.preparation import Prepared, SearchPrompts, prepare
from search.promising import MeasuringPlan
from search.prompts import PromptSplit
from search.quiet import Quiet
from search.relative_costs import RelativeCosts
from search.samplers import DraftChoices, NoRepeats, make_sampler
from search.settings import SEEDS, SearchSettings
from search.space import SearchSpace
from search.stand_ins import TrainedStandIn
from search.trials import Objective, policy_of
from search.warm_starts import AcceptanceAlone, StartingPlan, warm_starts
from studies.optimizing import optimize
from studies.ranking import (
    HasTrials,
    Snapshot,
    basis_of,
    best_trials,
    finalists,
    fully_measured_trials,
    measured_trials,
    seen_trials,
    speedup_of,
)
from studies.records import records_of
from studies.study import StudyContext, open_study

# Seconds; no timeout at all would be another thing.
_MOMENT = 1e-3


class Search:
    """Finds a draft for a model, and goes on where an earlier search of the same study stopped.

    Args:
        model: The model.
        identity: Its identity.
        prompts: What to decode.
        storage: Where the study lives.
        settings: How long and how thoroughly to search.
        space: What to choose among; None is the skip set, when drafts end, and the stand-ins.
        stand_ins: The trained ones that the space names, with their tensors.
        study_name: The study's name; None makes one of the model's id and of all that values depend on, so that the
            same search finds its study again and another search gets another one.
        observer: Told how it goes.
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
        model: LayerSkipModel,
        identity: ModelIdentity,
        prompts: PromptSplit,
        storage: BaseStorage,
        settings: SearchSettings,
        *,
        space: SearchSpace | None = None,
        stand_ins: Sequence[TrainedStandIn] = (),
        study_name: str | None = None,
        observer: SearchObserver | None = None,
        folder: Path | None = None,
        ends: float | None = None,
        number: int = 0,
        helpers: Callable[[str], AbstractContextManager[object]] = lambda study: nullcontext(),
    ) -> None:
        if study_name is not None and not study_name.strip():
            raise InvalidInputError("study: the name is empty; leave --study out for a name made of the search itself")
        self._model = model
        self._identity = identity
        self._storage = storage
        self._settings = settings
        self._observer = observer or SearchObserver()
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
        self._quiet = Quiet(self._folder, model.device, workers=settings.workers)
        self._number = number
        self._ends = ends
        self._helpers = helpers
        self._prepared: Prepared | None = None
        self._context = StudyContext(
            model=identity.id,
            fingerprint=identity.fingerprint,
            dtype=_dtype_name(model),
            device=_device_name(model),
            prompts=prompts.fingerprint,
            max_new_tokens=settings.max_new_tokens,
            prompts_per_trial=len(self._prompts.measured),
            space=self._space.describe(),
        )
        objectives = "-pareto" * settings.pareto
        self._name = study_name or f"{_file_name(identity.id)}-{self._context.digest}{objectives}"

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
            self._observer.finalists_chosen(len(chosen))
            for trial in chosen:
                decided.append(self._measure_finalist(trial))
                self._observer.finalist_measured(len(decided), trial, decided[-1].summary.speedup)
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
        objectives = 2 if self._settings.pareto else 1
        study = open_study(self._storage, self._name, self._context, objectives=objectives)
        self._observer.study_opened(study.study_name, progress_of(study))
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
            self._measurer(tools),
            self._prompts.measured,
            self._settings.sampler,
            self._settings.pareto,
        )
        callbacks = [self._report]
        if self._number == 0:
            earlier = [trial.number for trial in measured_trials(study)]
            alone = AcceptanceAlone(self._model, tools.estimator)
            starts = StartingPlan(
                warm_starts(self._space, alone, tools.estimator, tools.latency),
                alone,
                self._space,
                2 * self._settings.workers,  # a worker that finds none waiting would propose one of its own
                self._quiet,
            )
            starts(study)
            measuring = MeasuringPlan(self._settings.measuring_share, self._seconds_to_measure(tools), earlier)
            callbacks = [starts, measuring, *callbacks]
        self._observer.trials_begin()
        with self._helpers(study.study_name):
            optimize(study, objective, timeout=self._timeout(), callbacks=callbacks)

    def _timeout(self) -> float | None:
        return self._settings.timeout if self._ends is None else max(self._ends - time.monotonic(), _MOMENT)

    def _prepare(self, study: optuna.Study) -> Prepared:
        self._prepared = prepare(
            self._model,
            self._identity.fingerprint,
            self._prompts,
            self._space,
            self._settings,
            study,
            stand_ins=self._stand_ins,
            folder=self._folder,
            quiet=self._quiet,
            observer=self._observer,
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
        costs = RelativeCosts(tools.latency, tools.makers, context, self._model.engine.costs, space.stand_ins)
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

    def _measurer(self, tools: Prepared) -> Measurer:
        return Measurer(
            self._model,
            tools.makers,
            records_of(self._storage),
            self._name,
            max_new_tokens=self._settings.max_new_tokens,
            quiet=self._quiet,
            observer=self._observer,
        )

    def _seconds_to_measure(self, tools: Prepared) -> float:
        """What a measurement would take if drafts neither helped nor hurt."""
        tokens = self._settings.max_new_tokens * len(self._prompts.measured)
        return 2 * tokens * tools.latency.verification(1, 0.0, self._settings.max_new_tokens, None)

    def _report(self, study: optuna.Study, trial: FrozenTrial) -> None:
        progress = progress_of(Snapshot(study))
        self._observer.trial_finished(progress, trial)
        if progress.seen >= self._settings.trials:
            study.stop()

    def _measure_finalist(self, trial: FrozenTrial) -> Finalist:
        assert self._prepared is not None
        measurer, candidate = self._measurer(self._prepared), self._space.candidate(trial.params)
        with self._quiet.alone():
            measured = measurer.measurements(
                trial.number, candidate, policy_of(trial), self._prompts.held_out, "held-out"
            )
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


def _device_name(model: LayerSkipModel) -> str:
    """The device, and how passes run there if it is not the usual way."""
    ways = [device_name(model.device)]
    ways += [model.engine.name] * (model.engine.name != EagerEngine.name)
    ways += ["compiled"] * model.compiled
    return ", ".join(ways)


def _dtype_name(model: LayerSkipModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _file_name(id: str) -> str:
    """The last part of a model's id, fit for a study's name."""
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in id.rstrip("/").rpartition("/")[2]).lower()
