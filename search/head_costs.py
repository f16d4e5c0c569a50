"""Costs of draft heads, measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from layerskip.drafting.config import DraftConfig
from layerskip.drafting.drafter import RoundResult
from layerskip.drafting.head_drafter import HeadDrafter
from layerskip.drafting.stopping import FixedLength
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import Engine, Scored
from layerskip.sampling import Draft, Sampling, Verdict
from layerskip.skip_set import SkipSet
from layerskip.utils import device_seconds

_REPEATS = 11
_CONTEXT = 128  # a text of usual length, as for the costs of passes
# Tokens at which a draft is extended by a place, in the drafts that are timed; between them, seconds are interpolated.
_WAYS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class HeadCosts:
    """Seconds of drafting with heads.

    Args:
        base: Before any head runs.
        places: For each place, by the number of tokens of the place before at which the draft is extended, for each of
            ``ways``.
        ways: Those numbers, ascending.
    """

    base: float
    places: Sequence[Sequence[float]]
    ways: Sequence[int]

    def seconds(self, ways: Sequence[int]) -> float:
        """Of a draft that is extended at so many tokens for its first place, for its second, and so on."""
        asked = zip(ways, self.places, strict=False)
        return self.base + sum(float(np.interp(count, self.ways, seconds)) for count, seconds in asked)


@torch.inference_mode()
def measure_head_costs(engine: Engine, weights: DraftWeights) -> HeadCosts:
    """Measure drafts of every length: medians of interleaved repeats.

    Each draft but the empty ones comes after a round with one accepted token, in a text of usual length.

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
    return HeadCosts(median[0, 1], places, _WAYS)


def _even(ways: int, places: int) -> tuple[int | tuple[int, ...], ...]:
    """As many tokens at every place, each after another token of the place before."""
    return (ways, *[(1,) * ways] * (places - 1))
