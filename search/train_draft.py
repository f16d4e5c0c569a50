"""Train a draft: texts, training, the policy by simulation, and a measurement, from a model to a profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerskip.costs import CostModel, DraftRoundCosts
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.stopping import ConfidenceThreshold
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import Engine, measure_costs
from layerskip.errors import InvalidInputError
from layerskip.fingerprint import ModelIdentity
from layerskip.profile import DraftProfile, Provenance
from layerskip.skip_set import SkipSet
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
from layerskip.utils import library_versions
from search.builder import stack_round_costs
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
from search.head_costs import HeadCosts, measure_head_costs
from search.machine_lock import MachineLock
from search.measure import Measurement, MeasuringPlan, Summary, as_measured, draft_bytes, measure_drafters, summarize
from search.policies import PolicyChoice
from search.prompts import PromptSplit
from search.reference import ReferenceRun
from search.simulate import RoundCosts, Simulator, places_of
from search.space import SearchSpace
from search.traces import trace_early_exit, trace_heads, trace_lookups
from search.untrained_drafts import HEADS_KINDS, KINDS, Kind, ideal_speedups, untrained_weights

# Share of the layers that a draft keeps by default; Kangaroo's exits are lower, in deeper models.
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
        exit: Layers that the draft keeps; None is an eighth of them.
        kind: ``layer``: one decoder layer above the exit; ``bridge``: an affine map; ``medusa`` and ``hydra``: draft
            heads after the target, without an exit; ``hydra++``: Hydra's heads after a decoder layer that attends
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
            raise InvalidInputError(f"exit: {self.kind} heads draft after all layers, so there is none; leave it out")
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
    def num_heads(self) -> int:
        """Number of draft heads; 0 for other kinds."""
        return (self.heads or _HEADS) if self.drafts_with_heads else 0

    @property
    def training(self) -> TrainingSettings:
        """The part that says how to train."""
        loss = self.loss or ("ce" if self.kind == "medusa" else "kl")
        return TrainingSettings(loss=loss, epochs=self.epochs, minutes=self.minutes, seed=self.seed)


@dataclass(frozen=True)
class TuningResult:
    """The outcome of training a draft.

    Args:
        profile: The draft's profile; not measured if Ctrl-C ended the training.
        exit: Layers that the draft keeps; None for draft heads.
        heads: How many draft heads there are.
        positions: Positions of text that there were.
        agreement: How often the draft agrees on held-out texts.
        ideal: The speedup that this gives if verification costs one plain step, and drafting the weights that it reads.
        predicted: Speedup of the policy that simulation chose; None if Ctrl-C ended the training.
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
        split: Prompts: ``search`` for choosing the policy, ``held_out`` for the measurement.
        given: Whether texts to learn from come from these prompts too (two thirds of ``search``) rather than from
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
        # Heads learn from the texts that are kept for a draft layer above the usual exit.
        self._exit = settings.exit or max(round(_EXIT_SHARE * model.num_layers), 1)
        layers = model.num_layers
        self._skip_set = SkipSet(layers) if settings.drafts_with_heads else SkipSet.early_exit(layers, self._exit)
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
            self._exit,
            max_new_tokens=settings.answer_tokens,
            temperature=_AGAIN_TEMPERATURE if given else 0.0,
            seed=settings.seed,
        )
        self._writer = TrainingTextWriter(model, source, data_settings, folder, identity.fingerprint)

    def run(self) -> TuningResult:
        """Write texts, train, choose the policy and measure.

        Raises:
            LayerSkipError: Something cannot be kept on disk, or the draft changed the output.
        """
        settings, on_event = self._settings, self._on_event
        on_event(PhaseStarted("texts", settings.positions))
        texts = self._writer.collect(settings.positions, lambda positions: on_event(TextsWritten(positions)))
        ids = self._vocabulary(texts)
        on_event(TrainingStarted(texts.positions, self._model.vocab_size if ids is None else len(ids)))
        untrained = untrained_weights(
            self._model, settings.kind, exit=self._exit, heads=settings.num_heads, texts=texts, seed=settings.seed
        )
        ideal = ideal_speedups(self._model, untrained, self._skip_set, ids)
        trained = self._train(
            untrained, texts, ids, lambda result: on_event(Evaluated(result, ideal(result.agreement)))
        )
        on_event(TrainingEnded(trained))
        profile = self._profile(trained)
        predicted = None
        if not trained.interrupted:
            profile, predicted = self._measured(profile, trained.weights)
        return TuningResult(
            profile,
            None if settings.drafts_with_heads else self._exit,
            settings.num_heads,
            texts.positions,
            trained.agreement,
            ideal(trained.agreement),
            predicted,
            trained.interrupted,
        )

    def _vocabulary(self, texts: TrainingTexts) -> Tensor | None:
        size = self._settings.vocabulary
        if size is None:
            size = _VOCABULARY if self._model.vocab_size >= 2 * _VOCABULARY else 0
        return vocabulary_of(self._model, texts, size) if 0 < size < self._model.vocab_size else None

    def _train(
        self, untrained: DraftWeights, texts: TrainingTexts, ids: Tensor | None, observe: Callable[[EvalResult], None]
    ) -> Trained:
        trained = train(
            self._model,
            TrainableDraft(self._model, untrained),
            texts,
            self._settings.training,
            token_ids=ids,
            folder=texts.store.folder,
            observe=observe,
        )
        # In two bytes a number: half the file, and what a draft is off by changes no output.
        return replace(trained, weights=trained.weights.to(torch.bfloat16))

    def _profile(self, trained: Trained) -> DraftProfile:
        return DraftProfile.of(
            DraftConfig(self._skip_set, stopping=ConfidenceThreshold()),
            trained.weights,
            model=self._identity,
            provenance=Provenance(
                created=datetime.now(UTC),
                tool=f"layerskip {library_versions()['layerskip']}",
                training_seconds=trained.evaluations[-1].seconds if trained.evaluations else None,
            ),
        )

    def _measured(self, profile: DraftProfile, weights: DraftWeights) -> tuple[DraftProfile, float]:
        """The profile with the policy that simulation finds best, measured on held-out prompts; the prediction."""
        lock = MachineLock(self._folder, self._model.device)
        choice, costs = self._choose_policy(weights.placed_on(self._model), lock)
        config, predicted = choice.best().config, choice.expected_speedup()
        self._on_event(PolicyChosen(config, predicted))
        profile = DraftProfile.of(config, weights, model=profile.model, provenance=profile.provenance, costs=costs)
        summary = self._measure(profile, lock)
        length, size = self._settings.max_new_tokens, draft_bytes(self._model, config, weights)
        measured = as_measured(summary, "held-out", length, self._engine, draft_bytes=size)
        return profile.model_copy(update={"measured": measured}), predicted

    def _choose_policy(self, weights: DraftWeights, lock: MachineLock) -> tuple[PolicyChoice, DraftRoundCosts]:
        """The choice of the policy, and what rounds of the best one cost."""
        limit = self._settings.max_new_tokens
        with lock.shared():
            run = ReferenceRun(self._model, self._folder, self._identity.fingerprint)
            texts = run.texts(self._choosing, max_new_tokens=limit)
        space = space_for(weights, SearchSpace.of(self._model))
        self._on_event(PhaseStarted("costs"))
        with lock.exclusive():
            costs = measure_costs(self._engine, vocabularies=space.vocabulary_sizes, most_drafted=space.most_drafted)
            head_costs = measure_head_costs(self._engine, weights) if weights.heads else None
        choice = trained_policy_choice(
            self._engine, self._skip_set, weights, space, texts, costs, head_costs, max_new_tokens=limit
        )
        config = choice.best().config
        if head_costs is None or weights.heads is None:
            stack = self._model.stack_of(self._skip_set, stand_ins=weights.steps, token_ids=weights.token_ids)
            return choice, stack_round_costs(self._engine, costs, stack, config)
        return choice, head_round_costs(self._engine, costs, head_costs, config)

    def _measure(self, profile: DraftProfile, lock: MachineLock) -> Summary:
        drafter = profile.drafter(self._model)
        plan = MeasuringPlan(self._measuring, self._settings.max_new_tokens)
        measurements: list[Measurement] = []
        self._on_event(PromptMeasured(0, len(plan.prompts)))
        for by_name in measure_drafters(self._engine, {"draft": drafter}, plan, lock):
            measurements += by_name.values()
            self._on_event(PromptMeasured(len(measurements), len(plan.prompts)))
        return summarize(measurements)


def head_round_costs(engine: Engine, costs: CostModel, heads: HeadCosts, config: DraftConfig) -> DraftRoundCosts:
    """What rounds of draft heads cost, where a draft is as long as was asked for.

    Args:
        engine: Runs the passes.
        costs: What passes cost.
        heads: What heads cost.
        config: How they draft.
    """
    longest = config.stopping.new_state().max_length
    ways = [sum(map(bool, widths)) for widths in places_of(config.tree, longest)]
    return DraftRoundCosts.of(engine, costs, longest, lambda at, places: heads.seconds(ways[:places]))


def space_for(weights: DraftWeights, space: SearchSpace) -> SearchSpace:
    """The policies of a space for a trained draft, with its own vocabulary and drafts as long as its heads are many.

    Args:
        weights: The draft's.
        space: Everything else to try.
    """
    size = 0 if weights.token_ids is None else len(weights.token_ids)
    longest = space.max_draft_length if weights.heads is None else weights.heads.count
    return replace(space, vocabulary_sizes=(0, size) if size else (0,), max_draft_length=longest)


def trained_policy_choice(
    engine: Engine,
    skip_set: SkipSet,
    weights: DraftWeights,
    space: SearchSpace,
    texts: Sequence[TargetText],
    costs: CostModel,
    head_costs: HeadCosts | None,
    *,
    max_new_tokens: int,
) -> PolicyChoice:
    """The choice of the policy with which a trained draft is simulated to be fastest.

    Args:
        engine: Runs the passes of the model.
        skip_set: What the draft skips.
        weights: What was trained, on the model's device and in its dtype.
        space: From :func:`space_for`.
        texts: The texts to simulate on.
        costs: What passes cost.
        head_costs: What draft heads cost; None where the stack drafts.
        max_new_tokens: Most tokens of a generation.
    """
    model = engine.model
    if weights.heads is not None and head_costs is not None:
        traces = trace_heads(model, weights, texts)
        rounds = RoundCosts.of_heads(costs, head_costs, traces, space.most_drafted, at_once=weights.heads.at_once)
    else:
        stack = model.stack_of(skip_set, stand_ins=weights.steps, token_ids=weights.token_ids)
        traces = trace_early_exit(model, stack, texts)
        rounds = RoundCosts.of_stack(costs, stack, engine, traces, space.most_drafted)
    lookups = trace_lookups(space.prompt_lookups, texts, space.max_draft_length)
    config = DraftConfig(skip_set, vocabulary_size=max(space.vocabulary_sizes))
    simulator = Simulator(traces, rounds, max_new_tokens, lookups)
    return PolicyChoice(config, space, simulator, heads=weights.heads is not None)
