"""Playing a draft's traces through every policy: when would each have drafted, and what would it have cost?

No model runs. All policies and all texts go through their rounds side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerskip.costs import CostModel, DraftParts
from layerskip.drafting.config import DraftConfig, PromptLookup
from layerskip.drafting.stopping import AdaptiveThreshold
from layerskip.engine import Engine
from layerskip.sublayers import Stack
from search.acceptance import LAST_RANK, Trace
from search.copying import Copies


@dataclass(frozen=True, eq=False)
class RoundCosts:
    """What one candidate's rounds cost on each of ``n`` texts.

    Args:
        prefill: ``[n]``, seconds until the first token.
        step: ``[n]``, seconds of a draft step.
        verification: ``[n, largest draft + 1]``, seconds of verifying so many drafted tokens in a chain.
        trees: The same for tokens that branch or were copied, which are verified from the bottom of the stack.
    """

    prefill: np.ndarray
    step: np.ndarray
    verification: np.ndarray
    trees: np.ndarray

    @classmethod
    def of(cls, latency: CostModel, stack: Stack, engine: Engine, traces: Sequence[Trace], most: int) -> RoundCosts:
        """The costs of a draft.

        Args:
            latency: What the parts cost.
            stack: The draft's.
            engine: Says whether verification resumes from what drafting computed.
            traces: One for each text.
            most: Tokens in the largest draft of any policy.
        """
        share = stack.shared / len(engine.model.sublayers) if engine.resumes and engine.costs else 0.0
        halfway = [latency.at(trace.prompt_length + trace.new_tokens / 2) for trace in traces]
        parts = DraftParts.of(stack)

        def verification(share: float) -> np.ndarray:
            return np.array(
                [[costs.verification(k + 1, share if k else 0.0) for k in range(most + 1)] for costs in halfway]
            )

        return cls(
            np.array([latency.at(trace.prompt_length).prefill for trace in traces]),
            np.array([costs.draft_step(parts) for costs in halfway]),
            verification(share),
            verification(0.0),
        )

    @property
    def draft_cost(self) -> float:
        """A draft step in units of a plain decoding step, over all texts."""
        return float(self.step.sum() / self.verification[:, 0].sum())


@dataclass(frozen=True)
class SimulatedSpeedup:
    """What replay foretells of a candidate under its best policy.

    Args:
        config: The candidate with its best policy.
        speedup: Predicted plain seconds ÷ self-speculative seconds.
        acceptance_rate: Accepted ÷ drafted tokens; None if nothing would be drafted.
        seconds: Predicted for each text.
    """

    config: DraftConfig
    speedup: float
    acceptance_rate: float | None
    seconds: tuple[float, ...]


def replay(
    traces: Sequence[Trace],
    policies: Sequence[DraftConfig],
    costs: RoundCosts,
    *,
    limit: int,
    copies: Mapping[PromptLookup, Sequence[Copies]] | None = None,
) -> SimulatedSpeedup:
    """Find the policy with which a candidate would have been fastest.

    Args:
        traces: The candidate's, one for each text.
        policies: What to try.
        costs: What its rounds cost.
        limit: Most new tokens of a generation.
        copies: What the n-grams of the policies would copy, for each text.
    """
    rounds = _Rounds(traces, policies, costs, limit, copies or {})
    rounds.play()
    speedups = rounds.plain.sum() / rounds.seconds.sum(axis=1)  # [policies]
    best = int(speedups.argmax())
    drafted = rounds.drafted[best].sum()
    return SimulatedSpeedup(
        config=policies[best],
        speedup=float(speedups[best]),
        acceptance_rate=float(rounds.accepted[best].sum() / drafted) if drafted else None,
        seconds=tuple(rounds.seconds[best].tolist()),
    )


class _Rounds:
    """The state of ``s`` policies on ``n`` texts, each at a token of its own.

    ``newest[s, n]`` is the number of the text's newest token: the draft from there is asked at position ``newest``.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        policies: Sequence[DraftConfig],
        costs: RoundCosts,
        limit: int,
        copies: Mapping[PromptLookup, Sequence[Copies]],
    ) -> None:
        self._costs = costs
        self._each = np.arange(len(traces))
        exits = [policy.stopping for policy in policies]
        states = [draft_exit.new_state() for draft_exit in exits]
        self._longest = np.array([state.max_length for state in states])[:, None]
        self._gate = np.array([policy.target_confidence_threshold for policy in policies])[:, None]
        width = int(self._longest.max())
        self._shape(policies, width)
        self._room = limit - 1
        self._tabulate(traces, width)
        self._tabulate_copies(policies, copies)
        shape = (len(policies), len(traces))
        self._threshold = np.empty(shape)
        self._threshold[:] = np.array([state.threshold for state in states])[:, None]
        self._adaptive = [(row, one) for row, one in enumerate(exits) if isinstance(one, AdaptiveThreshold)]
        self._rate = np.zeros(shape)
        self._sure = np.ones(shape)
        self._newest = np.zeros(shape, dtype=int)
        self.drafted = np.zeros(shape, dtype=int)
        self.accepted = np.zeros(shape, dtype=int)
        self.seconds = np.broadcast_to(costs.prefill, shape).copy()
        tokens = np.array([trace.new_tokens for trace in traces])
        self.plain = costs.prefill + (tokens - 1) * costs.verification[:, 0]

    def _shape(self, policies: Sequence[DraftConfig], width: int) -> None:
        """By policy and depth: how many tokens are proposed there, and how many down to there."""
        self._branches = np.ones((len(policies), width + 1), dtype=int)
        for row, policy in enumerate(policies):
            here = policy.tree[:width]
            self._branches[row, : len(here)] = here
        none = np.zeros((len(policies), 1), dtype=int)
        self._tokens = np.concatenate([none, self._branches[:, :width].cumsum(axis=1)], axis=1)
        self._branching = np.array([[bool(policy.tree)] for policy in policies])
        self._policy = np.arange(len(policies))[:, None]

    def _tabulate(self, traces: Sequence[Trace], width: int) -> None:
        """By text and position: how many proposals from there on stand, and how sure the draft is of each.

        Behind the end of a text that ended by itself drafts go on, surely and in vain.
        """
        self._last = np.array([trace.new_tokens - 1 for trace in traces])
        n, positions = len(traces), int(self._last.max()) + 1
        self._stand = np.zeros((n, positions + 1), dtype=int)
        self._confidence = np.ones((n, positions + width))
        self._target = np.ones((n, positions + width))
        self._ranks = np.full((n, positions + width), LAST_RANK)
        for row, trace in enumerate(traces):
            asked = len(trace.agrees)
            self._confidence[row, :asked] = trace.confidence
            self._target[row, :asked] = trace.target_confidence
            self._ranks[row, :asked] = trace.ranks
            for position in range(asked - 1, -1, -1):
                self._stand[row, position] = trace.agrees[position] * (1 + self._stand[row, position + 1])
        windows = np.lib.stride_tricks.sliding_window_view(self._confidence, width, axis=1)
        self._windows = np.ascontiguousarray(windows)  # [n, positions + 1, width]

    def _tabulate_copies(
        self, policies: Sequence[DraftConfig], copies: Mapping[PromptLookup, Sequence[Copies]]
    ) -> None:
        """By n-grams, text and position: how many tokens are copied, and how many of them stand. Row 0 copies none."""
        shape = (len(copies) + 1, *self._stand.shape)
        self._copied, self._copies_stand = np.zeros(shape, dtype=int), np.zeros(shape, dtype=int)
        for number, of_texts in enumerate(copies.values(), start=1):
            for row, one in enumerate(of_texts[: len(self._each)]):
                self._copied[number, row, : len(one.drafted)] = one.drafted
                self._copies_stand[number, row, : len(one.stand)] = one.stand
        numbers = {None: 0} | {ngrams: number for number, ngrams in enumerate(copies, start=1)}
        self._ngrams = np.array([[numbers[policy.prompt_lookup]] for policy in policies])

    def play(self) -> None:
        """Run rounds until every text has ended under every policy."""
        while True:
            active = self._newest < self._last
            if not active.any():
                return
            self._round(active)

    def _round(self, active: np.ndarray) -> None:
        at = np.minimum(self._newest, self._last)  # [s, n]
        unsure = self._windows[self._each, at] < self._threshold[..., None]  # [s, n, width]
        by_confidence = np.where(unsure.any(-1), unsure.argmax(-1) + 1, unsure.shape[-1])
        room = np.maximum(self._room - at - 1, 0)
        copied = np.minimum(self._copied[self._ngrams, self._each, at], room)
        copies = copied > 0
        asked = np.minimum(np.minimum(by_confidence, self._longest), room)  # of the model
        asked = np.where(copies | (self._sure < self._gate), 0, asked)
        chain = np.minimum(asked, self._stand[self._each, at])
        # Where the chain fails, one of the leaves beside it may stand.
        beside = (chain < asked) & (self._ranks[self._each, at + chain] < self._branches[self._policy, chain])
        copies_stand = np.minimum(copied, self._copies_stand[self._ngrams, self._each, at])
        accepted = np.where(copies, copies_stand, chain + beside)
        verification = np.where(copies, self._costs.trees[self._each, copied], self._verification(asked))
        self.seconds += active * (asked * self._costs.step + verification)
        drafted = copied + asked
        self.drafted += active * drafted
        self.accepted += active * accepted
        self._adapt(active & (asked > 0), asked, accepted)
        self._sure = self._target[self._each, at + accepted]
        self._newest = np.where(active, at + accepted + 1, self._newest)

    def _verification(self, drafted: np.ndarray) -> np.ndarray:
        tokens = self._tokens[self._policy, drafted]
        costs = self._costs
        seconds: np.ndarray = np.where(
            self._branching, costs.trees[self._each, tokens], costs.verification[self._each, tokens]
        )
        return seconds

    def _adapt(self, learns: np.ndarray, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """As :class:`layerskip.AdaptiveThreshold` says."""
        for row, policy in self._adaptive:
            drafts = np.maximum(drafted[row], 1)
            rate = policy.rate_momentum * self._rate[row] + (1 - policy.rate_momentum) * accepted[row] / drafts
            falling = np.where(drafted[row] == policy.max_length, 0.0, -policy.step)
            wanted = self._threshold[row] + np.where(rate < policy.target_rate, policy.step, falling)
            moved = policy.threshold_momentum * self._threshold[row] + (1 - policy.threshold_momentum) * wanted
            self._rate[row] = np.where(learns[row], rate, self._rate[row])
            self._threshold[row] = np.where(learns[row], moved, self._threshold[row])
