"""What ``layerskip tune`` can make: stand-ins above an early exit, and draft heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from layerskip.drafts.assets import DraftAssets
from layerskip.drafts.bridges import fit_bridge, runs_of
from layerskip.drafts.heads import HEAD_KINDS, HeadKind, untrained_heads
from layerskip.drafts.layers import LayerWeights
from layerskip.errors import InvalidInputError
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from layerskip.stack.stack import Stack
from layerskip.tuning import Agreement, Learner, Shards, bridge_learner, heads_learner, layer_learner
from layerskip.tuning.prediction import LONGEST, head_costs_by_weights, ideal_speedup, step_cost_by_weights
from search.branching import branching_policies
from search.copying import copies_along, with_copies
from search.estimate import Trace, ranked
from search.head_replay import DraftSeconds, HeadCosts, head_policies, measure_drafts, replay_heads, trace_heads
from search.latency import LatencyModel
from search.reference import ReferenceText
from search.replay import Prediction, RoundCosts, replay
from search.space import SearchSpace

_BRIDGE_POSITIONS = 8192

HeadsKind = HeadKind | Literal["hydra++"]
HEADS_KINDS: tuple[HeadsKind, ...] = (*HEAD_KINDS, "hydra++")

Ideal = Callable[[Agreement], float]


@dataclass(frozen=True, eq=False)
class ReplayGround:
    """What policies are replayed on.

    Args:
        texts: What the full model wrote.
        space: The policies to try.
        latency: What parts of the stack cost.
        costs: From :meth:`TunedDraft.costs`.
        limit: Most new tokens of a generation.
    """

    texts: Sequence[ReferenceText]
    space: SearchSpace
    latency: LatencyModel
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

    def learner(self, shards: Shards) -> Learner:
        """What to train, as it is before."""

    def ideal(self, learner: Learner, token_ids: Tensor | None) -> Ideal:
        """The speedup that an agreement gives if verifying costs one plain step, and drafting the weights that it
        reads.

        Args:
            learner: What is trained.
            token_ids: ``[n]``, the draft vocabulary; None for the whole one.
        """

    def costs(self, assets: DraftAssets) -> DraftSeconds | None:
        """What has to be measured of drafting on a quiet machine, beside the parts of the stack."""

    def best_policy(self, assets: DraftAssets, ground: ReplayGround) -> Prediction:
        """When its drafts should end and how they should branch, by replay.

        Args:
            assets: What was trained, on the model's device and in its dtype.
            ground: What to replay on.
        """


class TunedStandIn:
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

    def learner(self, shards: Shards) -> Learner:
        if self._kind == "layer":
            # The top one knows best what the head expects.
            top = self._model.num_layers - 1
            return layer_learner(self._model, LayerWeights.copied(self._model, self._start, self._stop, top))
        before: list[Tensor] = []
        after: list[Tensor] = []
        share = max(shards.positions // _BRIDGE_POSITIONS, 1)
        for text in shards.learned(shards.paths):
            before.append(text.before[text.asked][::share])
            after.append(text.after[text.asked][::share])
        below, above = (torch.cat(part).to(self._model.device, torch.float32) for part in (before, after))
        return bridge_learner(self._model, fit_bridge(self._model, below, above, self._start, self._stop))

    def ideal(self, learner: Learner, token_ids: Tensor | None) -> Ideal:
        stand_ins = learner.assets(learner.parameters).stand_ins(self._model)
        stack = self._model.stack_of(self.skip_set, stand_ins=stand_ins, token_ids=token_ids)
        cost = step_cost_by_weights(self._model, stack)
        costs = [cost * length for length in range(1, LONGEST + 1)]
        return lambda agreement: ideal_speedup([agreement.top] * LONGEST, costs)

    def costs(self, assets: DraftAssets) -> DraftSeconds | None:
        return None

    def best_policy(self, assets: DraftAssets, ground: ReplayGround) -> Prediction:
        stand_ins = assets.stand_ins(self._model)
        stack = self._model.stack_of(self.skip_set, stand_ins=stand_ins, token_ids=assets.token_ids)
        traces = [trace_of(self._model, stack, text) for text in ground.texts]
        space, limit = ground.space, ground.limit
        rounds = RoundCosts.of(ground.latency, stack, self._model, traces, space.most_drafted)
        best = replay(traces, [*space.policies(), *branching_policies(traces, space)], rounds, limit=limit)
        if not space.ngrams:
            return best
        copies = copies_along(ground.texts)
        return with_copies(best, lambda policy: replay(traces, [policy], rounds, limit=limit, copies=copies))


class TunedHeads:
    """Draft heads behind the full model.

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

    def learner(self, shards: Shards) -> Learner:
        size = int(self._model.config.hidden_size)
        if self._kind == "hydra++":
            heads = untrained_heads("hydra", self.heads, size, seed=self._seed)
            return heads_learner(self._model, heads, LayerWeights.behind(self._model))
        return heads_learner(self._model, untrained_heads(self._kind, self.heads, size, seed=self._seed))

    def ideal(self, learner: Learner, token_ids: Tensor | None) -> Ideal:
        assets = learner.assets(learner.parameters)
        assert assets.heads is not None
        stack = self._model.stack_of(self.skip_set, token_ids=token_ids)
        costs = head_costs_by_weights(self._model, assets.heads, stack, assets.prefix(self._model))
        return lambda agreement: ideal_speedup(agreement.by_place, costs)

    def costs(self, assets: DraftAssets) -> DraftSeconds | None:
        return measure_drafts(self._model, assets)

    def best_policy(self, assets: DraftAssets, ground: ReplayGround) -> Prediction:
        heads = assets.heads
        assert heads is not None
        assert ground.costs is not None
        stack = self._model.stack_of(self.skip_set, token_ids=assets.token_ids)
        prefix = assets.prefix(self._model)
        traces = [trace_heads(self._model, heads, stack, text, prefix) for text in ground.texts]
        space, limit = ground.space, ground.limit
        rounds = HeadCosts.of(ground.latency, self._model, heads, ground.costs, traces, space.most_drafted)
        best = replay_heads(traces, list(head_policies(traces, heads.count, space)), rounds, limit=limit)
        if not space.ngrams:
            return best
        copies = copies_along(ground.texts)
        return with_copies(best, lambda policy: replay_heads(traces, [policy], rounds, limit=limit, copies=copies))


def space_for(draft: TunedDraft, assets: DraftAssets, space: SearchSpace) -> SearchSpace:
    """A space in which a draft's own vocabulary and its longest draft have costs.

    Args:
        draft: The draft.
        assets: What was trained.
        space: All else that there is to try.
    """
    size = 0 if assets.token_ids is None else len(assets.token_ids)
    longest = max(space.max_draft_length, draft.heads)
    return replace(space, vocabularies=(0, size) if size else (0,), max_draft_length=longest)


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
def trace_of(model: LayerSkipModel, stack: Stack, text: ReferenceText) -> Trace:
    """What a draft with an early exit would propose along a text: one pass over it, because it sees nothing but itself.

    Args:
        model: The model.
        stack: The draft's; above what it shares with the full model it has stand-ins alone.
        text: What the full model wrote.
    """
    tokens = text.tokens.to(model.device)
    n = len(tokens)
    x = stack.run(model.embed(tokens), model.pass_context(n, model.new_cache(n)))
    ranks, confidence = ranked(model, stack, x[0, text.prompt_length : n - 1], text.choices)
    return Trace(ranks.numpy(), confidence.numpy(), text.confidence.cpu().numpy(), text.prompt_length, text.new_tokens)
