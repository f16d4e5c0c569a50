"""When drafts of heads should end, and how they should branch: their rounds played through along known texts.

As :mod:`search.replay` does it for drafts of the stack. There one trace tells of every place of a draft, because all of
them are asked the same question. Heads have a trace for each place. It says what they propose where the text is as they
proposed it before: all that decides what stands, but not quite how far a draft of Hydra's goes on behind a wrong token.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate, product

import numpy as np
import torch

from layerskip.costs import CostModel
from layerskip.drafting.config import DraftConfig, PromptLookup
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.drafter import RoundResult
from layerskip.drafting.head_drafter import HeadDrafter, through_layer
from layerskip.drafting.heads import DraftHeads
from layerskip.drafting.stopping import ConfidenceThreshold, DraftStopping, FixedLength
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import Engine, Scored
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sampling import Draft, Sampling, Verdict
from layerskip.skip_set import SkipSet
from layerskip.sublayers import Stack
from layerskip.target_texts import TargetText
from layerskip.token_tree import branches_of, widths_of
from layerskip.utils import device_seconds
from search.acceptance import LAST_RANK, ranked
from search.copying import Copies
from search.replay import SimulatedSpeedup
from search.space import SearchSpace

_CONFIDENCES = (0.1, 0.2, 0.4, 0.6)
_REPEATS = 11
_CONTEXT = 128  # a text of usual length, as for the costs of passes
# Drafting is timed behind so many tokens at a time; between them seconds are interpolated.
_WAYS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, eq=False)
class HeadTrace:
    """What heads would propose along one reference text, where the text is as they proposed it up to their place.

    Args:
        ranks: By place ``[m - 1 - place]``: for each new token but the last ones, were it the newest, the rank of the
            target model's choice among the head's tokens, likeliest first; at most ``LAST_RANK``.
        confidence: Likewise, the probability of the head's likeliest token.
        target_confidence: ``[m - 1]``, the probability that the target model gives to its own choice behind each token.
        prompt_length: Tokens of the prompt.
        new_tokens: ``m``, tokens of the continuation.
    """

    ranks: tuple[np.ndarray, ...]
    confidence: tuple[np.ndarray, ...]
    target_confidence: np.ndarray
    prompt_length: int
    new_tokens: int


@torch.inference_mode()
def trace_heads(
    model: LayerSkipModel, heads: DraftHeads, stack: Stack, text: TargetText, prefix: DraftLayer | None = None
) -> HeadTrace:
    """The trace of heads along a text: one pass of the target model over it.

    Args:
        model: The model.
        heads: The heads, on its device and in its dtype.
        stack: Any of the model's, with the draft vocabulary.
        text: What the target model wrote.
        prefix: The layer that they read its states through, likewise; None where there is none.
    """
    tokens = text.tokens.to(model.device)
    states = model.forward(tokens, model.new_cache(len(tokens)))[0].to(model.device)
    if prefix is not None:
        states = through_layer(model, prefix, states, KVCache(num_layers=0, capacity=len(tokens)))
    embedded = model.embed(tokens)[0]
    ranks, confidence = [], []
    for place in range(heads.count):
        count = text.new_tokens - 1 - place  # newest tokens behind which the text has this place
        if count < 1:
            ranks.append(np.empty(0, dtype=int))
            confidence.append(np.empty(0))
            continue
        first = text.prompt_length
        known = embedded[first : first + count + place].unfold(0, place + 1, 1).transpose(1, 2)
        said = heads.at(place, states[first - 1 : first - 1 + count], known)
        rank, sure = ranked(model, stack, said, text.choices[place:])
        ranks.append(rank.numpy())
        confidence.append(sure.numpy())
    target = text.confidence.cpu().numpy()
    return HeadTrace(tuple(ranks), tuple(confidence), target, text.prompt_length, text.new_tokens)


def best_tree(traces: Sequence[HeadTrace], depth: int, size: int) -> tuple[int | tuple[int, ...], ...]:
    """The tree of a size that adds most to a round, with a path of some depth through the likeliest tokens.

    A token adds as often as the text runs through it: as the target's choices have the ranks there that lead to it.
    Likelier tokens are proposed first, whether or not they add more.

    Sources: Medusa (arXiv 2401.10774, section 2.3.3) and Sequoia (arXiv 2402.12374) grow trees in this way.

    Args:
        traces: Of the heads.
        depth: Places.
        size: Tokens, at least ``depth``.

    Returns:
        Its branches.
    """
    taken: Counter[tuple[int, ...]] = Counter()
    for trace in traces:
        for newest in range(len(trace.ranks[0])):
            path: tuple[int, ...] = ()
            for ranks in trace.ranks[:depth]:
                if newest >= len(ranks) or ranks[newest] == LAST_RANK:
                    break
                path = (*path, int(ranks[newest]))
                taken[path] += 1
    tree = {(0,) * length for length in range(1, depth + 1)}
    next_ones = {(*path[:-1], 1) for path in tree}
    while len(tree) < size:
        allowed = (path for path in next_ones if len(path) <= depth)
        best = max(allowed, key=lambda path: (taken[path], [-len(path), *(-rank for rank in path)]))
        tree.add(best)
        next_ones = (next_ones - {best}) | {(*best[:-1], best[-1] + 1), (*best, 0)}
    return branches_of(_widths(tree, depth))


def _widths(tree: Set[tuple[int, ...]], depth: int) -> Iterator[list[int]]:
    """How many tokens follow each of a place's, place by place."""
    before: list[tuple[int, ...]] = [()]
    for length in range(1, depth + 1):
        here = sorted(path for path in tree if len(path) == length)
        children = Counter(path[:-1] for path in here)
        yield [children[path] for path in before]
        before = here


def head_policies(
    config: DraftConfig, traces: Sequence[HeadTrace], heads: int, space: SearchSpace
) -> Iterator[DraftConfig]:
    """Drafts of every length, with and without a confidence threshold, gates and branches.

    Args:
        config: Everything but the policy.
        traces: Of the heads.
        heads: How many there are.
        space: Gives gates and sizes of trees.
    """
    for depth in range(1, heads + 1):
        exits: list[DraftStopping] = [FixedLength(depth)]
        if depth > 1:
            exits += [ConfidenceThreshold(confidence, depth) for confidence in _CONFIDENCES]
        shapes = [(), *(best_tree(traces, depth, size) for size in space.tree_sizes if size > depth)]
        for rule, threshold, shape in product(exits, space.target_confidence_thresholds, shapes):
            yield replace(config, stopping=rule, target_confidence_threshold=threshold, tree=shape)


@dataclass(frozen=True)
class DraftSeconds:
    """What drafting takes.

    Args:
        base: Seconds before any head is asked.
        places: For each place seconds by the number of tokens of the place before that are gone on behind, for each of
            ``ways``.
        ways: Those numbers, ascending.
    """

    base: float
    places: Sequence[Sequence[float]]
    ways: Sequence[int]

    def of(self, ways: Sequence[int]) -> float:
        """Seconds of a draft that goes on behind so many tokens at its first place, its second, and so on."""
        asked = zip(ways, self.places, strict=False)
        return self.base + sum(float(np.interp(count, self.ways, seconds)) for count, seconds in asked)


@dataclass(frozen=True, eq=False)
class HeadCosts:
    """What rounds cost.

    Args:
        draft: Seconds of drafting.
        prefill: For each text, seconds until the first token.
        verification: For each text, seconds of verifying by the number of drafted tokens, from 0 on.
        at_once: Whether all heads of a draft are asked before its first token is proposed.
    """

    draft: DraftSeconds
    prefill: Sequence[float]
    verification: Sequence[Sequence[float]]
    at_once: bool

    @classmethod
    def of(
        cls,
        latency: CostModel,
        heads: DraftHeads,
        draft: DraftSeconds,
        traces: Sequence[HeadTrace],
        most: int,
    ) -> HeadCosts:
        """The costs on texts of these lengths.

        Args:
            latency: What passes of the target model cost.
            heads: The heads.
            draft: As in the class.
            traces: One for each text.
            most: Tokens in the largest draft.
        """
        halfway = [latency.at(trace.prompt_length + trace.new_tokens / 2) for trace in traces]
        verification = [[costs.verification(k + 1) for k in range(most + 1)] for costs in halfway]
        return cls(draft, [latency.at(trace.prompt_length).prefill for trace in traces], verification, heads.at_once)


@torch.inference_mode()
def measure_drafts(engine: Engine, weights: DraftWeights) -> DraftSeconds:
    """Seconds of drafting with heads; medians, interleaved.

    Each draft but the empty ones comes behind a round in which one drafted token stood, in a text of usual length.

    Args:
        engine: Runs the passes of the model.
        weights: The heads, and the draft vocabulary.
    """
    model = engine.model
    text = torch.zeros(_CONTEXT, dtype=torch.long, device=model.device)
    newest, states = text[:1], model.embed(text)[0]
    cache, sampler = model.new_cache(0), Sampling().sampler(model.device)
    nothing, scores = Draft.of([], model.device), model.logits(states[None, :2])
    before = RoundResult(nothing, Verdict([0, 0], newest, (0, 1)), text[:2], Scored(scores, states[:2]))
    assert weights.heads is not None
    longest = weights.heads.count
    config = DraftConfig(SkipSet(model.num_layers), stopping=FixedLength(longest))
    drafters = {ways: HeadDrafter(model, replace(config, tree=_even(ways, longest)), weights) for ways in _WAYS}
    for drafter in drafters.values():
        drafter.start(engine, text, states)
    seconds: dict[tuple[int, int], list[float]] = {at: [] for at in product(range(longest + 1), _WAYS)}
    for repeat in range(_REPEATS + 1):
        for (length, ways), measured in seconds.items():
            if length:
                drafters[ways].observe(before)
            began = device_seconds(model.device)
            drafters[ways].propose(newest, cache, length, sampler)
            if repeat:
                measured.append(device_seconds(model.device) - began)
    median = {at: statistics.median(measured) for at, measured in seconds.items()}
    places = [
        [max(median[length, ways] - median[length - 1, ways], 0.0) for ways in _WAYS]
        for length in range(1, longest + 1)
    ]
    return DraftSeconds(median[0, 1], places, _WAYS)


def _even(ways: int, places: int) -> tuple[int | tuple[int, ...], ...]:
    """As many tokens at every place, each behind another one of the place before."""
    return (ways, *[(1,) * ways] * (places - 1))


def replay_heads(
    traces: Sequence[HeadTrace],
    policies: Sequence[DraftConfig],
    costs: HeadCosts,
    *,
    limit: int,
    copies: Mapping[PromptLookup, Sequence[Copies]] | None = None,
) -> SimulatedSpeedup:
    """Find the policy with which the heads would have been fastest.

    Args:
        traces: One for each text.
        policies: What to try; adaptive thresholds are not known here.
        costs: What rounds cost.
        limit: Most new tokens of a generation.
        copies: What the n-grams of the policies would copy, for each text.
    """
    plain = sum(
        prefill + (trace.new_tokens - 1) * verification[0]
        for trace, prefill, verification in zip(traces, costs.prefill, costs.verification, strict=True)
    )

    def predicted(policy: DraftConfig) -> SimulatedSpeedup:
        copied = (copies or {})[policy.prompt_lookup] if policy.prompt_lookup else [None] * len(traces)
        played = [
            _Played(trace, policy, costs, number, limit, one)
            for number, (trace, one) in enumerate(zip(traces, copied, strict=True))
        ]
        seconds = tuple(one.seconds for one in played)
        drafted = sum(one.drafted for one in played)
        rate = sum(one.accepted for one in played) / drafted if drafted else None
        return SimulatedSpeedup(policy, plain / sum(seconds), rate, seconds)

    return max(map(predicted, policies), key=lambda prediction: prediction.speedup)


class _Played:
    """One text's rounds under a policy.

    Attributes:
        seconds: What they would take, with the prompt.
        drafted: Places that tokens would be proposed for.
        accepted: Proposed tokens that would stand.
    """

    def __init__(
        self, trace: HeadTrace, policy: DraftConfig, costs: HeadCosts, number: int, limit: int, copies: Copies | None
    ) -> None:
        self._trace = trace
        self._policy = policy
        self._costs = costs
        state = policy.stopping.new_state()
        self._longest = min(state.max_length, len(trace.ranks))
        self._threshold = state.threshold
        self._shape(widths_of(policy.tree))
        self.seconds, self.drafted, self.accepted = costs.prefill[number], 0, 0
        newest, sure = 0, 1.0
        while newest < trace.new_tokens - 1:
            room = max(limit - newest - 2, 0)
            copied = min(int(copies.drafted[newest]), room) if copies else 0
            if copies and copied:
                seconds, drafted, tokens, accepted = 0.0, copied, copied, min(copied, int(copies.stand[newest]))
            else:
                asked = 0 if sure < policy.target_confidence_threshold else min(self._longest, room)
                seconds, drafted, tokens, accepted = self._of_heads(newest, asked)
            self.seconds += seconds + costs.verification[number][tokens]
            self.drafted += drafted
            self.accepted += accepted
            behind = newest + accepted
            sure = trace.target_confidence[behind] if behind < len(trace.target_confidence) else 1.0
            newest = behind + 1

    def _shape(self, widths: Sequence[Sequence[int]]) -> None:
        """By place: how many tokens follow each of the place before; how many of these have any, and how many tokens
        there are up to there."""
        self._widths = [widths[place] if place < len(widths) else (1,) for place in range(self._longest)]
        self._ways = [sum(map(bool, place)) for place in self._widths]
        self._tokens = [0, *accumulate(map(sum, self._widths))]

    def _of_heads(self, newest: int, asked: int) -> tuple[float, int, int, int]:
        """A draft of at most ``asked`` places: its seconds, places and tokens, and how many of these stand."""
        drafted = self._drafted(newest, asked)
        seconds = self._costs.draft.of(self._ways[: asked if self._costs.at_once else drafted])
        return seconds, drafted, self._tokens[drafted], self._accepted(newest, drafted)

    def _drafted(self, newest: int, most: int) -> int:
        for place in range(most):
            confidence = self._trace.confidence[place]
            # Behind the end of a text that ended by itself drafts go on, surely and in vain.
            if newest < len(confidence) and confidence[newest] < self._threshold:
                return place + 1
        return most

    def _accepted(self, newest: int, drafted: int) -> int:
        way = 0  # which of its place's tokens the text has come to
        for place, widths in enumerate(self._widths[:drafted]):
            rank = self._rank(newest, place)
            if way >= len(widths) or rank >= widths[way]:
                return place
            way = sum(widths[:way]) + rank
        return drafted

    def _rank(self, newest: int, place: int) -> int:
        ranks = self._trace.ranks[place]
        return int(ranks[newest]) if newest < len(ranks) else LAST_RANK
