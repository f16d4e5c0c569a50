"""What a candidate would bring, foretold without decoding: an estimate of its agreement, replayed at known costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from layerskip.costs import CostModel
from layerskip.engine import Engine
from search.acceptance import AcceptanceTracer, Trace, acceptance
from search.branching import branching_policies
from search.builder import DraftBuilder
from search.copying import copies_along, with_copies
from search.replay import Prediction, RoundCosts, replay
from search.space import Candidate, Policy, SearchSpace

# A candidate is given up when it is slower than the best one by so many standard errors of the difference.
_RACING_ERRORS = 2.0
# A few texts can agree by chance; the standard error is taken for at least this share of the seconds.
_SMALLEST_ERROR = 0.01


@dataclass(frozen=True)
class Estimate:
    """What one candidate was found to be worth.

    Args:
        acceptance: Its one-step acceptance rate α.
        draft_cost: What one of its draft steps costs, c, in units of a plain decoding step.
        prediction: What replay made of it.
        complete: Whether all texts were looked at; a candidate that cannot win is given up earlier.
    """

    acceptance: float
    draft_cost: float
    prediction: Prediction
    complete: bool


def _cannot_win(seconds: Sequence[float], to_beat: Sequence[float]) -> bool:
    """Whether a candidate is clearly slower than the best, on the texts that both were seen on."""
    both = len(seconds)
    if len(to_beat) < both or both < 2:
        return False
    slower = np.subtract(seconds, to_beat[:both])
    error = max(slower.std(ddof=1) / math.sqrt(both), _SMALLEST_ERROR * float(np.mean(seconds)))
    return bool(slower.mean() > _RACING_ERRORS * error)


class SpeedupPredictor:
    """Foretells speedups.

    Args:
        engine: Runs verification, whose width it chooses by its costs.
        space: The search space, with the policies to replay.
        makers: Makes drafts' bridges and vocabularies.
        estimator: Gives drafts' traces.
        latency: What the parts of steps cost.
        max_new_tokens: Most tokens of a generation.
    """

    def __init__(
        self,
        engine: Engine,
        space: SearchSpace,
        makers: DraftBuilder,
        estimator: AcceptanceTracer,
        latency: CostModel,
        *,
        max_new_tokens: int,
    ) -> None:
        self._engine = engine
        self._makers = makers
        self._estimator = estimator
        self._latency = latency
        self._limit = max_new_tokens
        self._space = space
        self._chains = space.policies()
        self._copies = copies_along(estimator.texts) if space.ngrams else {}

    def estimate(self, candidate: Candidate, to_beat: Sequence[float] = ()) -> Estimate:
        """Look at a candidate, some texts at a time, until all were seen or it cannot win.

        Args:
            candidate: What to look at.
            to_beat: Predicted seconds of the best candidate so far for each text; without them all texts are looked at.
        """
        stack = self._makers.stack(candidate)
        traces: list[Trace] = []
        parts = self._estimator.traces(stack)
        while True:
            traces += next(parts)
            costs = RoundCosts.of(self._latency, stack, self._engine, traces, self._space.most_drafted)
            policies = [*self._chains, *branching_policies(traces, self._space)]
            prediction = replay(traces, policies, costs, limit=self._limit)
            if self._copies:
                prediction = with_copies(prediction, partial(self._replayed, traces, costs))
            complete = len(traces) == self._estimator.num_texts
            if complete or _cannot_win(prediction.seconds, to_beat):
                return Estimate(acceptance(traces), costs.draft_cost, prediction, complete)

    def _replayed(self, traces: Sequence[Trace], costs: RoundCosts, policy: Policy) -> Prediction:
        return replay(traces, [policy], costs, limit=self._limit, copies=self._copies)
