"""Simulate decoding along traces: how long it would take under each policy, without running the model.

All policies and all texts go through their rounds side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np
from numpy.typing import NDArray

from layerskip.costs import CostModel, DraftParts
from layerskip.drafting.config import DraftConfig, PromptLookup
from layerskip.drafting.controller import Controller
from layerskip.drafting.stopping import AdaptiveThreshold
from layerskip.engine import Engine
from layerskip.sublayers import Stack
from layerskip.token_tree import Branches, widths_of
from search.head_costs import HeadCosts
from search.traces import LAST_RANK, LookupTrace, Trace

# Sources of proposals: indices of their controllers.
_COPYING, _DRAFTING = 0, 1

Floats = NDArray[np.float64]
Ints = NDArray[np.int_]


@dataclass(frozen=True, eq=False)
class RoundCosts:
    """What rounds of one draft cost on each of ``n`` texts, in seconds.

    Args:
        prefill: ``[n]``, until the first token.
        drafting: Of a draft, ``[n]``, by the number of tokens at which each of its places is extended.
        chains: ``[n, longest draft + 1]``, of verifying so many drafted tokens in a chain.
        trees: ``[n, largest draft + 1]``, the same for tokens of a tree and for copied ones, verified from the bottom
            of the stack.
        at_once: Whether a draft costs as much as its longest, wherever it stops.
    """

    prefill: Floats
    drafting: Callable[[Sequence[int]], Floats]
    chains: Floats
    trees: Floats
    at_once: bool = False

    @classmethod
    def of_stack(
        cls, costs: CostModel, stack: Stack, engine: Engine, traces: Sequence[Trace], most_drafted: int
    ) -> RoundCosts:
        """Costs of a draft of the stack.

        Args:
            costs: What passes cost.
            stack: The draft's.
            engine: Says whether verification resumes from what drafting computed.
            traces: One for each text.
            most_drafted: Tokens in the largest draft of any policy.
        """
        share = stack.shared / len(engine.model.sublayers) if engine.resumes and engine.costs else 0.0
        parts = DraftParts.of(stack)
        step = np.array([costs.at(_halfway(trace)).draft_step(parts) for trace in traces])
        return cls(
            _prefill(costs, traces),
            lambda ways: len(ways) * step,
            _verification(costs, traces, most_drafted, share),
            _verification(costs, traces, most_drafted),
        )

    @classmethod
    def of_heads(
        cls, costs: CostModel, heads: HeadCosts, traces: Sequence[Trace], most_drafted: int, *, at_once: bool
    ) -> RoundCosts:
        """Costs of draft heads.

        Args:
            costs: What passes cost.
            heads: What heads cost.
            traces: One for each text.
            most_drafted: Tokens in the largest draft of any policy.
            at_once: Whether all heads run before the first token of a draft is proposed.
        """
        verification = _verification(costs, traces, most_drafted)
        texts = np.ones(len(traces))
        return cls(
            _prefill(costs, traces), lambda ways: heads.seconds(ways) * texts, verification, verification, at_once
        )

    @property
    def draft_cost(self) -> float:
        """A draft of one token in units of a plain decoding step, over all texts."""
        return float(self.drafting((1,)).sum() / self.chains[:, 0].sum())


def _halfway(trace: Trace) -> float:
    return trace.prompt_length + trace.new_tokens / 2


def _prefill(costs: CostModel, traces: Sequence[Trace]) -> Floats:
    return np.array([costs.at(trace.prompt_length).prefill for trace in traces])


def _verification(costs: CostModel, traces: Sequence[Trace], most_drafted: int, share: float = 0.0) -> Floats:
    """``[n, most_drafted + 1]``, seconds by drafted tokens, if a share of the sublayers is computed by drafting."""
    halfway = [costs.at(_halfway(trace)) for trace in traces]
    drafted = range(most_drafted + 1)
    return np.array([[at.verification(k + 1, share if k else 0.0) for k in drafted] for at in halfway])


@dataclass(frozen=True)
class SimulatedSpeedup:
    """The outcome of a simulation.

    Args:
        config: The draft configuration, with its policy.
        speedup: Plain seconds ÷ self-speculative seconds.
        acceptance_rate: Accepted ÷ drafted tokens; None if nothing would be drafted.
        seconds: Of self-speculative decoding, for each text.
    """

    config: DraftConfig
    speedup: float
    acceptance_rate: float | None
    seconds: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Simulator:
    """Simulates decoding with one draft, under any policy.

    Args:
        traces: The draft's, one for each of ``n`` texts.
        costs: What its rounds cost.
        max_new_tokens: Most new tokens of a generation.
        lookups: Traces of prompt lookup on at least these texts, by its settings, for drafts as long as any policy's.
        controlled: Whether copying and drafting pause where they do not pay, each under a :class:`Controller` that has
            seen the text before this one (the last one before the first).
    """

    traces: Sequence[Trace]
    costs: RoundCosts
    max_new_tokens: int
    lookups: Mapping[PromptLookup, Sequence[LookupTrace]] = field(default_factory=dict)
    controlled: bool = False

    def simulate(self, configs: Sequence[DraftConfig]) -> list[SimulatedSpeedup]:
        """Simulate the policies of several configurations, all of this draft."""
        rounds = _Rounds(self, configs)
        rounds.run()
        if rounds.controllers:
            rounds = _Rounds(self, configs, [controllers.at_the_next_text() for controllers in rounds.controllers])
            rounds.run()
        tokens = np.array([trace.new_tokens for trace in self.traces])
        plain = (self.costs.prefill + (tokens - 1) * self.costs.chains[:, 0]).sum()
        drafted, accepted = rounds.drafted.sum(axis=1), rounds.accepted.sum(axis=1)
        return [
            SimulatedSpeedup(
                config,
                speedup=float(plain / seconds.sum()),
                acceptance_rate=float(accepted[row] / drafted[row]) if drafted[row] else None,
                seconds=tuple(seconds.tolist()),
            )
            for row, (config, seconds) in enumerate(zip(configs, rounds.seconds, strict=True))
        ]


class _Rounds:
    """The state of ``s`` policies on ``n`` texts, each at a token of its own.

    ``newest[s, n]`` is the number of the text's newest token: a draft from there has its first place at that position.
    Every array below that is indexed by texts and positions goes beyond the texts' ends: past EOS, drafts count as
    confident and rejected.
    """

    def __init__(
        self, simulator: Simulator, configs: Sequence[DraftConfig], controllers: Sequence[_Controllers] = ()
    ) -> None:
        traces, self._costs = simulator.traces, simulator.costs
        states = [config.stopping.new_state() for config in configs]
        places = min(max(state.max_length for state in states), traces[0].places)
        shape = (len(configs), len(traces))
        self._room = simulator.max_new_tokens - 1
        self._text = np.arange(len(traces))
        self._last = np.array([trace.new_tokens - 1 for trace in traces])
        self._longest = np.array([[min(state.max_length, places)] for state in states])
        self._target_threshold = np.array([[config.target_confidence_threshold] for config in configs])
        self._threshold = np.repeat([[state.threshold] for state in states], len(traces), axis=1)
        rules = [config.stopping for config in configs]
        self._adaptive = [(row, rule) for row, rule in enumerate(rules) if isinstance(rule, AdaptiveThreshold)]
        self._rate = np.zeros(shape)
        self._tabulate(traces, places)
        self._tabulate_trees(configs, places)
        self._tabulate_lookups(configs, simulator.lookups, places)
        new = [_Controllers.new(shape) for _ in (_COPYING, _DRAFTING)] if simulator.controlled else ()
        self.controllers = controllers or new
        self._target = np.ones(shape)  # the target's confidence at the end of the last round
        self._newest = np.zeros(shape, dtype=int)
        self.drafted = np.zeros(shape, dtype=int)
        self.accepted = np.zeros(shape, dtype=int)
        self.seconds = np.broadcast_to(self._costs.prefill, shape).copy()

    def _tabulate(self, traces: Sequence[Trace], places: int) -> None:
        """Ranks and confidences ``[n, newest token, place]``, and the target's confidences ``[n, position]``."""
        starts = int(self._last.max()) + 1
        n, positions = len(traces), starts + places
        ranks, confidence = np.full((n, places, positions), LAST_RANK), np.ones((n, places, positions))
        self._target_confidence = np.ones((n, positions))
        for row, trace in enumerate(traces):
            known = trace.new_tokens - 1
            ranks[row, :, :known] = trace.ranks[:places]
            confidence[row, :, :known] = trace.confidence[:places]
            self._target_confidence[row, :known] = trace.target_confidence

        reached = [(slice(None), place, slice(place, place + starts)) for place in range(places)]
        self._ranks = np.stack([ranks[at] for at in reached], axis=-1)
        self._confidence = np.stack([confidence[at] for at in reached], axis=-1)

    def _tabulate_trees(self, configs: Sequence[DraftConfig], places: int) -> None:
        """By tree: tokens and seconds of drafts by their places, and how many places of the longest are accepted."""
        trees = {tree: number for number, tree in enumerate(dict.fromkeys(config.tree for config in configs))}
        shapes = [places_of(tree, places) for tree in trees]
        self._tree = np.array([[trees[config.tree]] for config in configs])
        self._branching = np.array([[bool(config.tree)] for config in configs])
        self._tokens = np.array([[0, *accumulate(map(sum, shape))] for shape in shapes])  # [trees, places + 1]
        ways = [[sum(map(bool, widths)) for widths in shape] for shape in shapes]
        # [trees, n, places + 1]
        self._drafting = np.array(
            [np.stack([self._costs.drafting(row[:count]) for count in range(places + 1)], axis=1) for row in ways]
        )
        self._agreeing = (np.cumsum(self._ranks != 0, axis=-1) == 0).sum(axis=-1)  # [n, newest], on the main path
        self._acceptable = np.array([_accepted_places(self._ranks, shape) for shape in shapes])  # [trees, n, newest]

    def _tabulate_lookups(
        self, configs: Sequence[DraftConfig], lookups: Mapping[PromptLookup, Sequence[LookupTrace]], places: int
    ) -> None:
        """``[lookups, n, newest token, places + 1]``, tokens copied after so many drafted ones, and how many of them
        are accepted; the first row copies none."""
        used = list(dict.fromkeys(config.prompt_lookup for config in configs if config.prompt_lookup))
        self._lookup = np.array(
            [[used.index(config.prompt_lookup) + 1 if config.prompt_lookup else 0] for config in configs]
        )
        self._longest_copy = np.array([[c.prompt_lookup.length if c.prompt_lookup else 0] for c in configs])
        shape = (len(used) + 1, len(self._text), int(self._last.max()) + 1, places + 1)
        self._copied, self._copied_accepted = np.zeros((2, *shape), dtype=int)
        for number, lookup in enumerate(used, start=1):
            for row, trace in zip(self._text, lookups[lookup], strict=False):
                tokens = len(trace.copied)
                self._copied[number, row, :tokens] = trace.copied[:, : places + 1]
                self._copied_accepted[number, row, :tokens] = trace.accepted[:, : places + 1]

    def run(self) -> None:
        """Run rounds until every text has ended under every policy."""
        while True:
            active = self._newest < self._last
            if not active.any():
                return
            self._round(active)

    def _round(self, active: NDArray[np.bool_]) -> None:
        at = np.minimum(self._newest, self._last)  # [s, n]
        room = np.maximum(self._room - at - 1, 0)
        copied = np.minimum(self._copied[self._lookup, self._text, at, 0], self._allowed(_COPYING, room))
        copies = copied > 0
        most = np.minimum(self._longest, self._allowed(_DRAFTING, room))
        requested = np.where(copies | (self._target < self._target_threshold), 0, most)
        asked = np.minimum(requested, self._stops_after(at))
        right = np.minimum(asked, self._acceptable[self._tree, self._text, at])
        tokens = self._tokens[self._tree, asked]
        # What continues a wrong draft is not known; it costs what would continue the right one, and is rejected.
        space = self._allowed(_COPYING, np.maximum(np.minimum(room - asked, self._longest_copy - tokens), 0))
        tail = np.where(asked > 0, np.minimum(self._copied[self._lookup, self._text, at, asked], space), 0)
        copied = np.where(copies, copied, tail)
        goes_on = self._agreeing[self._text, at] >= asked
        copied_right = np.where(
            goes_on, np.minimum(copied, self._copied_accepted[self._lookup, self._text, at, asked]), 0
        )
        accepted = right + copied_right
        drafting = self._drafting[self._tree, self._text, requested if self._costs.at_once else asked]
        drafting = np.where(copies, 0.0, drafting)
        of_draft = np.where(
            self._branching, self._costs.trees[self._text, tokens], self._costs.chains[self._text, tokens]
        )
        verification = np.where(copied > 0, self._costs.trees[self._text, tokens + copied], of_draft)
        self.seconds += active * (drafting + verification)
        self.drafted += active * (asked + copied)
        self.accepted += active * accepted
        if self.controllers:
            plain = self._costs.chains[:, 0]
            added = copied_right - (verification - of_draft) / plain
            self.controllers[_COPYING].observe(active, added, copied, copied_right)
            self.controllers[_DRAFTING].observe(active, right + 1 - (drafting + of_draft) / plain, asked, right)
        self._adapt(active & (asked > 0), asked, right)
        self._target = self._target_confidence[self._text, at + accepted]
        self._newest = np.where(active, at + accepted + 1, self._newest)

    def _allowed(self, source: int, wanted: Ints) -> Ints:
        """How many of the tokens wanted the controllers of a source of proposals allow."""
        return self.controllers[source].limit(wanted) if self.controllers else wanted

    def _stops_after(self, at: Ints) -> Ints:
        """Places after which the stopping rules end drafts."""
        unsure = self._confidence[self._text, at] < self._threshold[..., None]  # [s, n, places]
        places: Ints = np.where(unsure.any(-1), unsure.argmax(-1) + 1, unsure.shape[-1])
        return places

    def _adapt(self, learns: NDArray[np.bool_], drafted: Ints, accepted: Ints) -> None:
        """As :class:`layerskip.AdaptiveThreshold` says."""
        for row, rule in self._adaptive:
            drafts = np.maximum(drafted[row], 1)
            rate = rule.rate_momentum * self._rate[row] + (1 - rule.rate_momentum) * accepted[row] / drafts
            falling = np.where(drafted[row] == rule.max_length, 0.0, -rule.step)
            wanted = self._threshold[row] + np.where(rate < rule.target_rate, rule.step, falling)
            moved = rule.threshold_momentum * self._threshold[row] + (1 - rule.threshold_momentum) * wanted
            self._rate[row] = np.where(learns[row], rate, self._rate[row])
            self._threshold[row] = np.where(learns[row], moved, self._threshold[row])


class _Controllers:
    """A controller for each of ``s`` policies on ``n`` texts."""

    def __init__(self, controllers: Sequence[Sequence[Controller]]) -> None:
        self._controllers = controllers

    @classmethod
    def new(cls, shape: tuple[int, int]) -> _Controllers:
        """Those that have seen nothing yet."""
        return cls([[Controller() for _ in range(shape[1])] for _ in range(shape[0])])

    def at_the_next_text(self) -> _Controllers:
        """The same, each at the start of the text after its own."""
        for controller in chain.from_iterable(self._controllers):
            controller.start()
        return _Controllers([[row[-1], *row[:-1]] for row in self._controllers])

    def limit(self, wanted: Ints) -> Ints:
        """Of the tokens wanted, ``[s, n]``, how many may be proposed."""
        rows = zip(self._controllers, wanted.tolist(), strict=True)
        return np.array([[c.limit(tokens) for c, tokens in zip(*row, strict=True)] for row in rows])

    def observe(self, active: NDArray[np.bool_], gain: Floats, proposed: Ints, accepted: Ints) -> None:
        """Learn from the rounds of the texts that have not ended, each ``[s, n]``."""
        for policy, text in zip(*np.nonzero(active), strict=True):
            controller, at = self._controllers[policy][text], (policy, text)
            if proposed[at]:
                controller.observe(float(gain[at]), proposed=int(proposed[at]), accepted=int(accepted[at]))
            else:
                controller.rest()


def places_of(tree: Branches, places: int) -> list[tuple[int, ...]]:
    """How many tokens follow each token of the place before, for each of so many places."""
    widths = widths_of(tree)
    return [widths[place] if place < len(widths) else (1,) for place in range(places)]


def _accepted_places(ranks: Ints, shape: Sequence[tuple[int, ...]]) -> Ints:
    """How many places of a draft are accepted if none stops it.

    Args:
        ranks: ``[n, newest token, place]``, of the target's choices.
        shape: As :func:`places_of` returns it.

    Returns:
        ``[n, newest token]``.
    """
    token, accepted = np.zeros(ranks.shape[:2], dtype=int), np.zeros(ranks.shape[:2], dtype=int)
    going = np.ones(ranks.shape[:2], dtype=bool)
    for place, widths in enumerate(shape):
        going &= token < len(widths)  # later tokens of a place have none after them
        token = np.minimum(token, len(widths) - 1)
        going &= ranks[..., place] < np.array(widths)[token]
        token = np.array([0, *accumulate(widths)])[token] + ranks[..., place]
        accepted += going
    return accepted
