"""Predict the speedup of a candidate without decoding: trace it, and simulate it at known costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from layerskip.costs import CostModel
from layerskip.drafting.config import DraftConfig
from layerskip.engine import Engine
from layerskip.sublayers import Stack
from search.acceptance_tracer import AcceptanceTracer
from search.break_even import DraftBreakEven, Shortfall
from search.builder import DraftBuilder
from search.policies import PolicyChoice
from search.simulate import RoundCosts, SimulatedSpeedup, Simulator
from search.space import SearchSpace
from search.traces import Trace, acceptance, trace_lookups

# A candidate is given up when it is slower than the best one by so many standard errors of the difference.
_RACING_ERRORS = 2.0
# A few texts can agree by chance; the standard error is taken for at least this share of the seconds.
_SMALLEST_ERROR = 0.01


@dataclass(frozen=True)
class Prediction:
    """The predicted speedup of a candidate.

    Args:
        acceptance: Its one-step acceptance rate α.
        draft_cost: Cost c of one of its draft steps, in units of a plain decoding step.
        speedup: With a policy that was chosen on other texts.
        simulated: Its best policy over all texts, and what each would take with it.
        complete: Whether it was traced on all texts; a candidate that cannot win is given up earlier.
    """

    acceptance: float
    draft_cost: float
    speedup: float
    simulated: SimulatedSpeedup
    complete: bool


def _cannot_win(seconds: Sequence[float], to_beat: Sequence[float]) -> bool:
    """Whether a candidate is clearly slower than the best one, on the texts that both were traced on."""
    both = len(seconds)
    if len(to_beat) < both or both < 2:
        return False
    slower = np.subtract(seconds, to_beat[:both])
    error = max(slower.std(ddof=1) / math.sqrt(both), _SMALLEST_ERROR * float(np.mean(seconds)))
    return bool(slower.mean() > _RACING_ERRORS * error)


class SpeedupPredictor:
    """Predicts speedups.

    Args:
        engine: Runs verification, whose width it chooses by its costs.
        space: The search space, with the policies to simulate.
        builder: Builds drafts.
        tracer: Traces drafts.
        costs: What passes cost.
        max_new_tokens: Most tokens of a generation.
    """

    def __init__(
        self,
        engine: Engine,
        space: SearchSpace,
        builder: DraftBuilder,
        tracer: AcceptanceTracer,
        costs: CostModel,
        *,
        max_new_tokens: int,
    ) -> None:
        self._engine = engine
        self._space = space
        self._builder = builder
        self._tracer = tracer
        self._costs = costs
        self._max_new_tokens = max_new_tokens
        self._lookups = trace_lookups(space.prompt_lookups, tracer.texts, space.max_draft_length)

    def plain_seconds(self) -> list[float]:
        """What plain decoding is predicted to take for each text, in their order."""
        return [
            self._costs.at(text.prompt_length).prefill
            + (text.new_tokens - 1) * self._costs.at(text.prompt_length + text.new_tokens / 2).plain_step
            for text in self._tracer.texts
        ]

    def predict(self, candidate: DraftConfig, to_beat: Sequence[float] = ()) -> Prediction:
        """Trace a candidate on some texts at a time, until all were traced or it cannot win, and simulate it.

        Args:
            candidate: The candidate.
            to_beat: Predicted seconds of the best candidate so far for each text; without them all texts are traced.
        """
        stack, config = self._builder.stack(candidate), self._builder.as_built(candidate)
        traces: list[Trace] = []
        parts = self._tracer.trace(stack)
        while True:
            traces += next(parts)
            simulator = self._simulator(stack, traces)
            choice = PolicyChoice(config, self._space, simulator)
            simulated = choice.best()
            complete = len(traces) == self._tracer.num_texts
            if complete or _cannot_win(simulated.seconds, to_beat):
                draft_cost = simulator.costs.draft_cost
                return Prediction(acceptance(traces), draft_cost, choice.expected_speedup(), simulated, complete)

    def controlled_share(self, config: DraftConfig) -> float:
        """The speedup of a configuration under a controller, as a share of its speedup without one.

        It was chosen because it pays on these texts, so a controller can hardly gain anything on them: the rest is what
        is paid for losing little on texts that are unlike them.
        """
        simulator = self._simulator_on_all_texts(config)
        [free], [controlled] = (one.simulate([config]) for one in (simulator, replace(simulator, controlled=True)))
        return controlled.speedup / free.speedup

    def shortfall(self, config: DraftConfig) -> Shortfall:
        """How often a configuration's draft is right, and how often it would have to be."""
        simulator = self._simulator_on_all_texts(config)
        chains = simulator.costs.chains.sum(axis=0)
        verification = {drafted + 1: chains[drafted] / chains[0] for drafted in range(self._space.max_draft_length + 1)}
        needed = DraftBreakEven.of(str(config), simulator.costs.draft_cost, verification)
        return Shortfall(acceptance(simulator.traces), needed, verification[needed.length + 1])

    def _simulator_on_all_texts(self, config: DraftConfig) -> Simulator:
        stack = self._builder.stack(config)
        return self._simulator(stack, [trace for part in self._tracer.trace(stack) for trace in part])

    def _simulator(self, stack: Stack, traces: Sequence[Trace]) -> Simulator:
        costs = RoundCosts.of_stack(self._costs, stack, self._engine, traces, self._space.most_drafted)
        return Simulator(traces, costs, self._max_new_tokens, self._lookups)
