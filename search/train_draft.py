"""From a model and an exit to a profile of a trained draft: texts, training, the draft exit by replay, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerskip.costs import CostModel
from layerskip.drafting.bridges import fit_bridge, runs_of
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.heads import HEAD_KINDS, HeadKind, untrained_heads
from layerskip.drafting.stopping import ConfidenceThreshold
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import Engine, measure_costs
from layerskip.errors import InvalidInputError
from layerskip.fingerprint import ModelIdentity
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile, Provenance
from layerskip.skip_set import SkipSet
from layerskip.sublayers import Stack
from layerskip.target_texts import TargetText
from layerskip.training import (
    Agreement,
    DataSettings,
    EvalResult,
    GivenPrompts,
    Loss,
    PromptSource,
    SelfWrittenPrompts,
    TrainableDraft,
    Trained,
    TrainingSettings,
    TrainingTexts,
    TrainingTextWriter,
    train,
    vocabulary_of,
)
from layerskip.training.evaluation import LONGEST, head_costs_by_weights, ideal_speedup, step_cost_by_weights
from layerskip.utils import cache_write_errors, library_versions
from search.acceptance import Trace, ranked
from search.branching import branching_policies
from search.callbacks import (
    Evaluated,
    OnEvent,
    PhaseStarted,
    PolicyChosen,
    PromptMeasured,
    TextsWritten,
    TrainingEnded,
    TrainingStarted,
    ignore,
)
from search.copying import copies_along, with_copies
from search.head_replay import DraftSeconds, HeadCosts, head_policies, measure_drafts, replay_heads, trace_heads
from search.machine_lock import MachineLock
from search.measure import Measurement, MeasuringPlan, Summary, as_measured, measure_drafter, summarize
from search.prompts import PromptSplit
from search.reference import ReferenceRun
from search.replay import RoundCosts, SimulatedSpeedup, replay
from search.space import SearchSpace

_BRIDGE_POSITIONS = 8192

HeadsKind = HeadKind | Literal["hydra++"]
HEADS_KINDS: tuple[HeadsKind, ...] = (*HEAD_KINDS, "hydra++")

Ideal = Callable[[Agreement], float]


@dataclass(frozen=True, eq=False)
class ReplayGround:
    """What policies are replayed on.

    Args:
        engine: Runs the passes of the model.
        texts: What the target model wrote.
        space: The policies to try.
        latency: What parts of the stack cost.
        costs: From :meth:`TunedDraft.costs`.
        limit: Most new tokens of a generation.
    """

    engine: Engine
    texts: Sequence[TargetText]
    space: SearchSpace
    latency: CostModel
    costs: DraftSeconds | None
    limit: int


class TunedDraft(Protocol):
    """A kind of draft that can be trained.

    Attributes:
        exit: Layers that it keeps; None where it runs nothing of the stack.
        heads: How many draft heads it has.
        skip_set: What it leaves out.
    """

    exit: int | None
    heads: int

    @property
    def skip_set(self) -> SkipSet: ...

    def learner(self, shards: TrainingTexts) -> TrainableDraft:
        """What to train, as it is before."""

    def ideal(self, learner: TrainableDraft, token_ids: Tensor | None) -> Ideal:
        """The speedup that an agreement gives if verifying costs one plain step, and drafting the weights that it
        reads.

        Args:
            learner: What is trained.
            token_ids: ``[n]``, the draft vocabulary; None for the whole one.
        """

    def costs(self, engine: Engine, weights: DraftWeights) -> DraftSeconds | None:
        """What has to be measured of drafting on a quiet machine, beside the parts of the stack."""

    def best_policy(self, weights: DraftWeights, ground: ReplayGround) -> SimulatedSpeedup:
        """When its drafts should end and how they should branch, by replay.

        Args:
            weights: What was trained, on the model's device and in its dtype.
            ground: What to replay on.
        """


class AboveExit:
    """A decoder layer or a bridge in place of all layers above an early exit.

    Args:
        model: The model.
        kind: Which of them.
        exit: Layers that the draft keeps.
    """

    heads = 0

    def __init__(self, model: LayerSkipModel, kind: Literal["layer", "bridge"], exit: int) -> None:
        self._model = model
        self._kind = kind
        self.exit: int | None = exit
        self._start, self._stop = 2 * exit, len(model.sublayers)

    @property
    def skip_set(self) -> SkipSet:
        return early_exit(self._model.num_layers, self._start // 2)

    def learner(self, shards: TrainingTexts) -> TrainableDraft:
        if self._kind == "layer":
            # The top one knows best what the head expects.
            top = self._model.num_layers - 1
            layer = DraftLayer.copied(self._model, self._start, self._stop, top)
            return TrainableDraft(self._model, DraftWeights(layers=[layer]))
        before: list[Tensor] = []
        after: list[Tensor] = []
        share = max(shards.positions // _BRIDGE_POSITIONS, 1)
        for text in shards.learned():
            before.append(text.states[0, text.asked][::share])
            after.append(text.states[1, text.asked][::share])
        below, above = (torch.cat(part).to(self._model.device, torch.float32) for part in (before, after))
        bridge = fit_bridge(self._model, below, above, self._start, self._stop)
        return TrainableDraft(self._model, DraftWeights(bridges=[bridge]))

    def ideal(self, learner: TrainableDraft, token_ids: Tensor | None) -> Ideal:
        stack = self._model.stack_of(self.skip_set, stand_ins=learner.weights.steps, token_ids=token_ids)
        cost = step_cost_by_weights(self._model, stack)
        costs = [cost * length for length in range(1, LONGEST + 1)]
        return lambda agreement: ideal_speedup([agreement.top] * LONGEST, costs)

    def costs(self, engine: Engine, weights: DraftWeights) -> DraftSeconds | None:
        return None

    def best_policy(self, weights: DraftWeights, ground: ReplayGround) -> SimulatedSpeedup:
        stack = self._model.stack_of(self.skip_set, stand_ins=weights.steps, token_ids=weights.token_ids)
        traces = [trace_of(self._model, stack, text) for text in ground.texts]
        space, limit = ground.space, ground.limit
        rounds = RoundCosts.of(ground.latency, stack, ground.engine, traces, space.most_drafted)
        config = config_of(self, weights)
        policies = [*space.policies(config), *branching_policies(config, traces, space)]
        best = replay(traces, policies, rounds, limit=limit)
        if not space.prompt_lookup:
            return best
        copies = copies_along(ground.texts)
        return with_copies(best, lambda config: replay(traces, [config], rounds, limit=limit, copies=copies))


class TunedHeads:
    """Draft heads behind the target model.

    Args:
        model: The model.
        kind: Which kind; ``hydra++`` has a layer before Hydra's heads.
        heads: How many.
        seed: Of what is random in untrained ones.
    """

    exit: int | None = None

    def __init__(self, model: LayerSkipModel, kind: HeadsKind, heads: int, *, seed: int) -> None:
        self._model = model
        self._kind = kind
        self.heads = heads
        self._seed = seed

    @property
    def skip_set(self) -> SkipSet:
        return SkipSet(self._model.num_layers)

    def learner(self, shards: TrainingTexts) -> TrainableDraft:
        size = int(self._model.config.hidden_size)
        if self._kind == "hydra++":
            heads = untrained_heads("hydra", self.heads, size, seed=self._seed)
            weights = DraftWeights(layers=[DraftLayer.identity(self._model)], heads=heads)
        else:
            weights = DraftWeights(heads=untrained_heads(self._kind, self.heads, size, seed=self._seed))
        return TrainableDraft(self._model, weights)

    def ideal(self, learner: TrainableDraft, token_ids: Tensor | None) -> Ideal:
        heads = learner.weights.heads
        assert heads is not None
        stack = self._model.stack_of(self.skip_set, token_ids=token_ids)
        costs = head_costs_by_weights(self._model, heads, stack, learner.weights.prefix_layer)
        return lambda agreement: ideal_speedup(agreement.by_place, costs)

    def costs(self, engine: Engine, weights: DraftWeights) -> DraftSeconds | None:
        return measure_drafts(engine, weights)

    def best_policy(self, weights: DraftWeights, ground: ReplayGround) -> SimulatedSpeedup:
        heads = weights.heads
        assert heads is not None
        assert ground.costs is not None
        stack = self._model.stack_of(self.skip_set, token_ids=weights.token_ids)
        prefix = weights.prefix_layer
        traces = [trace_heads(self._model, heads, stack, text, prefix) for text in ground.texts]
        space, limit = ground.space, ground.limit
        rounds = HeadCosts.of(ground.latency, heads, ground.costs, traces, space.most_drafted)
        policies = list(head_policies(config_of(self, weights), traces, heads.count, space))
        best = replay_heads(traces, policies, rounds, limit=limit)
        if not space.prompt_lookup:
            return best
        copies = copies_along(ground.texts)
        return with_copies(best, lambda config: replay_heads(traces, [config], rounds, limit=limit, copies=copies))


def config_of(draft: TunedDraft, weights: DraftWeights) -> DraftConfig:
    """How a trained draft drafts, but for its policy."""
    size = 0 if weights.token_ids is None else len(weights.token_ids)
    return DraftConfig(draft.skip_set, vocabulary_size=size)


def space_for(draft: TunedDraft, weights: DraftWeights, space: SearchSpace) -> SearchSpace:
    """A space in which a draft's own vocabulary and its longest draft have costs.

    Args:
        draft: The draft.
        weights: What was trained.
        space: All else that there is to try.
    """
    size = 0 if weights.token_ids is None else len(weights.token_ids)
    longest = max(space.max_draft_length, draft.heads)
    return replace(space, vocabulary_sizes=(0, size) if size else (0,), max_draft_length=longest)


def early_exit(num_layers: int, layers: int) -> SkipSet:
    """The skip set of a draft that leaves the model behind so many layers.

    Raises:
        InvalidInputError: They are none, or all.
    """
    if not 1 <= layers < num_layers:
        raise InvalidInputError(f"exit: expected 1 to {num_layers - 1}, layers of the model to keep, got {layers}")
    skipped = range(layers, num_layers)
    return SkipSet(num_layers, skipped, skipped)  # type: ignore[arg-type]


def exit_of(skip_set: SkipSet) -> int:
    """The layers that a draft with an early exit keeps.

    Raises:
        InvalidInputError: The skip set is none: it keeps something above what it leaves out.
    """
    match runs_of(skip_set):
        case [(start, stop)] if stop == 2 * skip_set.num_layers and start % 2 == 0 and start:
            return start // 2
    raise InvalidInputError(
        f"the profile leaves out {skip_set}, which is no early exit, and only what reaches the top can be tuned; "
        "name an exit with --exit"
    )


@torch.inference_mode()
def trace_of(model: LayerSkipModel, stack: Stack, text: TargetText) -> Trace:
    """What a draft with an early exit would propose along a text: one pass over it, because it sees nothing but itself.

    Args:
        model: The model.
        stack: The draft's; above what it shares with the target model it has stand-ins alone.
        text: What the target model wrote.
    """
    tokens = text.tokens.to(model.device)
    n = len(tokens)
    x = stack.run(model.embed(tokens), model.pass_context(n, model.new_cache(n)))
    ranks, confidence = ranked(model, stack, x[0, text.prompt_length : n - 1], text.choices)
    return Trace(ranks.numpy(), confidence.numpy(), text.confidence.cpu().numpy(), text.prompt_length, text.new_tokens)


Kind = Literal["layer", "bridge"] | HeadsKind
KINDS: tuple[Kind, ...] = ("layer", "bridge", *HEADS_KINDS)

# The share of layers that a draft keeps unless it is told otherwise; Kangaroo's exits are lower, in deeper models.
_EXIT_SHARE = 1 / 8
_VOCABULARY = 8192
# Answers to the same given prompts are sampled, so that asking them again gives other texts.
_ROUNDS = 64
_AGAIN_TEMPERATURE = 0.8
_HEADS = 4


@dataclass(frozen=True)
class TuningSettings:
    """What to train and how.

    Args:
        exit: Layers that the draft keeps; None takes an eighth of them.
        kind: ``layer``: one decoder layer above the exit; ``bridge``: an affine map; ``medusa`` and ``hydra``: draft
            heads after the target, without an exit; ``hydra++``: Hydra's heads behind a decoder layer that attends
            to the target model's last hidden states of the whole text.
        heads: How many draft heads; None is 4.
        loss: What training minimizes, see :class:`~layerskip.training.TrainingSettings`; None is ``ce`` for Medusa,
            as in their paper, and ``kl`` for the others.
        positions: Positions of the model's own text to learn from and to test with.
        minutes: Most minutes of training; None has no limit but the epochs.
        epochs: How often each text is learned from, at most.
        vocabulary: Size of the draft vocabulary; 0 is the whole one, None takes 8,192 where the model has twice as
            many tokens.
        answer_tokens: Most tokens of each text that the model writes to learn from.
        max_new_tokens: Most tokens of each prompt that is measured.
        seed: Makes texts and training repeatable.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    exit: int | None = None
    kind: Kind = "layer"
    heads: int | None = None
    loss: Loss | None = None
    positions: int = 80_000
    minutes: float | None = None
    epochs: int = 8
    vocabulary: int | None = None
    answer_tokens: int = 128
    max_new_tokens: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInputError(f"kind '{self.kind}' is unknown; expected {', '.join(KINDS)}")
        if self.drafts_with_heads and self.exit is not None:
            raise InvalidInputError(f"exit: {self.kind} heads draft behind all layers, so there is none; leave it out")
        if not self.drafts_with_heads and self.heads is not None:
            others = f"{', '.join(HEADS_KINDS[:-1])} or {HEADS_KINDS[-1]}"
            raise InvalidInputError(f"heads: a {self.kind} has none; leave it out, or choose {others}")
        for name in ("exit", "heads", "positions", "answer_tokens", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.vocabulary is not None and self.vocabulary < 0:
            raise InvalidInputError(f"draft vocabulary: expected a number of tokens from 0 on, got {self.vocabulary}")
        self.training  # noqa: B018 - its own checks

    @property
    def drafts_with_heads(self) -> bool:
        """Whether draft heads are to be trained."""
        return self.kind in HEADS_KINDS

    @property
    def training(self) -> TrainingSettings:
        """The part that says how to train."""
        loss = self.loss or ("ce" if self.kind == "medusa" else "kl")
        return TrainingSettings(loss=loss, epochs=self.epochs, minutes=self.minutes, seed=self.seed)


@dataclass(frozen=True)
class Tuned:
    """What tuning came to.

    Args:
        profile: The draft's profile; without figures if Ctrl-C ended the training.
        exit: Layers that the draft keeps; None for draft heads.
        heads: How many draft heads there are.
        positions: Positions of text that there were.
        agreement: How the draft does on held-out texts.
        ideal: The speedup that this gives if verifying costs one plain step, and drafting the weights that
            it reads.
        predicted: What replay foretells of the draft exit that it chose; None without figures.
        interrupted: Whether Ctrl-C ended the training.
    """

    profile: DraftProfile
    exit: int | None
    heads: int
    positions: int
    agreement: Agreement
    ideal: float
    predicted: float | None
    interrupted: bool


class Tuning:
    """Makes a profile of a trained draft.

    Args:
        engine: Runs the passes of the model.
        tokenizer: Its tokenizer.
        identity: What it is.
        split: Prompts: ``search`` for choosing the draft exit, ``held_out`` for the figures.
        given: Whether texts to learn from shall come from these prompts too (two thirds of ``search``) rather than from
            prompts that the model writes itself.
        settings: What to train and how.
        folder: Where texts, trainings and references are kept.
        on_event: Called with what happens.

    Raises:
        InvalidInputError: The model cannot write prompts of its own, or the exit is not inside it.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        identity: ModelIdentity,
        split: PromptSplit,
        settings: TuningSettings,
        *,
        given: bool,
        folder: Path,
        on_event: OnEvent = ignore,
    ) -> None:
        model = engine.model
        self._engine, self._model = engine, model
        self._identity = identity
        self._settings = settings
        self._folder = folder
        self._on_event = on_event
        # Texts to train heads with are those that are kept for a stand-in above the usual exit.
        exit_after = settings.exit or max(round(_EXIT_SHARE * model.num_layers), 1)
        self._draft = _draft(model, settings, exit_after)
        learned = 2 * len(split.search) // 3 if given else 0
        self._choosing = split.search[learned:] or split.search
        self._measuring = split.held_out
        source: PromptSource
        if given:
            prompts = split.search[:learned] or split.search
            source = GivenPrompts([prompt.tokens for prompt in prompts], rounds=_ROUNDS, seed=settings.seed)
        else:
            source = SelfWrittenPrompts(model, tokenizer, seed=settings.seed)
        data_settings = DataSettings(
            exit_after,
            max_new_tokens=settings.answer_tokens,
            temperature=_AGAIN_TEMPERATURE if given else 0.0,
            seed=settings.seed,
        )
        self._data = TrainingTextWriter(model, source, data_settings, folder, identity.fingerprint)

    def run(self) -> Tuned:
        """Write, train, choose and measure.

        Raises:
            LayerSkipError: Something cannot be kept on disk, or the draft changed the output.
        """
        self._on_event(PhaseStarted("texts", self._settings.positions))
        shards = self._data.collect(self._settings.positions, lambda positions: self._on_event(TextsWritten(positions)))
        ids = self._vocabulary(shards)
        self._on_event(TrainingStarted(shards.positions, self._model.vocab_size if ids is None else len(ids)))
        learner = self._draft.learner(shards)
        ideal = self._draft.ideal(learner, ids)

        def observe(look: EvalResult) -> None:
            self._on_event(Evaluated(look, ideal(look.agreement)))

        trained = self._trained(learner, shards, ids, observe)
        self._on_event(TrainingEnded(trained))
        profile = self._profile(trained)
        predicted = None
        if not trained.interrupted:
            profile, predicted = self._with_figures(profile, trained.weights)
        return Tuned(
            profile,
            self._draft.exit,
            self._draft.heads,
            shards.positions,
            trained.agreement,
            ideal(trained.agreement),
            predicted,
            trained.interrupted,
        )

    def _vocabulary(self, shards: TrainingTexts) -> Tensor | None:
        size = self._settings.vocabulary
        if size is None:
            size = _VOCABULARY if self._model.vocab_size >= 2 * _VOCABULARY else 0
        return vocabulary_of(self._model, shards, size) if 0 < size < self._model.vocab_size else None

    def _trained(
        self, learner: TrainableDraft, shards: TrainingTexts, ids: Tensor | None, observe: Callable[[EvalResult], None]
    ) -> Trained:
        with cache_write_errors(shards.store.folder, "the training"):
            trained = train(
                self._model,
                learner,
                shards,
                self._settings.training,
                token_ids=ids,
                folder=shards.store.folder,
                observe=observe,
            )
        # In two bytes a number: half the file, and what a draft is off by changes no output.
        return replace(trained, weights=trained.weights.to(torch.bfloat16))

    def _profile(self, trained: Trained) -> DraftProfile:
        return DraftProfile.of(
            DraftConfig(self._draft.skip_set, stopping=ConfidenceThreshold()),
            trained.weights,
            model=self._identity,
            provenance=Provenance(
                created=datetime.now(UTC),
                tool=f"layerskip {library_versions()['layerskip']}",
                training_seconds=trained.evaluations[-1].seconds if trained.evaluations else None,
            ),
        )

    def _with_figures(self, profile: DraftProfile, weights: DraftWeights) -> tuple[DraftProfile, float]:
        """The profile with the draft exit that replay finds best, measured on held-out prompts."""
        quiet = MachineLock(self._folder, self._model.device)
        with quiet.shared():
            run = ReferenceRun(self._model, self._folder, self._identity.fingerprint)
            texts = run.texts(self._choosing, max_new_tokens=self._settings.max_new_tokens)
        here = weights.placed_on(self._model)
        best = self._best_policy(here, texts, quiet)
        self._on_event(PolicyChosen(best.config, best.speedup))
        profile = DraftProfile.of(best.config, weights, model=profile.model, provenance=profile.provenance)
        summary = self._measured(profile, quiet)
        measured = as_measured(summary, "held-out", self._settings.max_new_tokens, self._engine)
        return profile.model_copy(update={"measured": measured}), best.speedup

    def _best_policy(self, weights: DraftWeights, texts: Sequence[TargetText], quiet: MachineLock) -> SimulatedSpeedup:
        space = space_for(self._draft, weights, SearchSpace.of(self._model))
        self._on_event(PhaseStarted("costs"))
        with quiet.exclusive():
            latency = measure_costs(self._engine, vocabularies=space.vocabulary_sizes, most_drafted=space.most_drafted)
            costs = self._draft.costs(self._engine, weights)
        ground = ReplayGround(self._engine, texts, space, latency, costs, limit=self._settings.max_new_tokens)
        return self._draft.best_policy(weights, ground)

    def _measured(self, profile: DraftProfile, lock: MachineLock) -> Summary:
        drafter = profile.drafter(self._model)
        plan = MeasuringPlan(self._measuring, self._settings.max_new_tokens)
        measurements: list[Measurement] = []
        self._on_event(PromptMeasured(0, len(plan.prompts)))
        for measurement in measure_drafter(self._engine, drafter, plan, lock):
            measurements.append(measurement)
            self._on_event(PromptMeasured(len(measurements), len(plan.prompts)))
        return summarize(measurements)


def _draft(model: LayerSkipModel, settings: TuningSettings, exit_after: int) -> TunedDraft:
    match settings.kind:
        case "medusa" | "hydra" | "hydra++" as kind:
            return TunedHeads(model, kind, settings.heads or _HEADS, seed=settings.seed)
        case "layer" | "bridge" as kind:
            return AboveExit(model, kind, exit_after)
