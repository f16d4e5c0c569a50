"""Comparing ways to decode, on one machine and the same prompts, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from layerskip.engine import Engine
from layerskip.errors import LosslessnessError
from layerskip.model import LayerSkipModel
from search.decoding_methods import DecodingMethod
from search.interleaving import WARM_UP_TOKENS, Runs, TimedRun, measurement, time_interleaved, warm_up
from search.machine_lock import MachineLock
from search.measure import PromptMeasurement, parts_at_near_tie
from search.prompts import EncodedPrompt
from studies.comparison import Entry
from studies.statistics import speedup_of_all


def able(
    contenders: Sequence[DecodingMethod], prompt: EncodedPrompt
) -> tuple[Sequence[DecodingMethod], dict[str, str]]:
    """Those of some contenders that can decode with the model at all, and why the others cannot, by name.

    Args:
        contenders: Who would like to.
        prompt: What to try them with. An error of layerskip itself is raised.
    """
    reasons: dict[str, str] = {}
    for contender in contenders:
        try:
            contender.decode(prompt.tokens, WARM_UP_TOKENS)
        except Exception as error:  # another's code, which may fail in any way
            if not contender.foreign:
                raise
            reasons[contender.name] = (
                f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            )
    return [contender for contender in contenders if contender.name not in reasons], reasons


def compare(
    engine: Engine,
    contenders: Sequence[DecodingMethod],
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    repeats: int,
    quiet: MachineLock,
    on_prompt: Callable[[int], None],
) -> list[Entry]:
    """Decode prompts in every way, interleaved, and hold all against the first.

    Args:
        engine: Runs the passes of the model.
        contenders: Who decodes; layerskip's plain decoding is the first.
        prompts: What to decode, at least one.
        max_new_tokens: Most tokens for each.
        repeats: How often each prompt is decoded by each.
        quiet: Keeps searches on this machine waiting meanwhile.
        on_prompt: Called with the number of prompts decoded by all so far, counting repeats.

    Returns:
        What each came to, in their order.
    """
    model = engine.model
    warm_up(engine, contenders, prompts, max_new_tokens=max_new_tokens)
    peaks = [_peak_bytes(model, contender, prompts, max_new_tokens) for contender in contenders]
    runs = time_interleaved(
        engine, contenders, prompts, max_new_tokens=max_new_tokens, repeats=repeats, quiet=quiet, on_prompt=on_prompt
    )
    return [
        _entry(model, prompts, contender, runs[0], own, peak)
        for contender, own, peak in zip(contenders, runs, peaks, strict=True)
    ]


def _peak_bytes(
    model: LayerSkipModel, contender: DecodingMethod, prompts: Sequence[EncodedPrompt], max_new_tokens: int
) -> int | None:
    """Most device memory in use while the longest prompt is decoded, above what was in use before."""
    if model.device.type != "cuda":
        return None
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    contender.decode(longest.tokens, max_new_tokens)
    return torch.cuda.max_memory_allocated(model.device) - before


def _entry(
    model: LayerSkipModel,
    prompts: Sequence[EncodedPrompt],
    contender: DecodingMethod,
    plain: Runs,
    own: Runs,
    peak_bytes: int | None,
) -> Entry:
    measured: list[PromptMeasurement] = []
    different = 0
    for prompt in prompts:
        near_tie = _parts_at_near_tie(model, prompt, plain[prompt.id], own[prompt.id])
        different += near_tie is None
        measured.append(measurement(prompt.id, plain[prompt.id], own[prompt.id], near_tie=bool(near_tie)))
    rates = _rates(own)
    every = [run for runs in own.values() for run in runs]
    drafted = sum(run.decoded.drafted for run in every)
    draft_seconds = sum(run.decoded.draft_seconds for run in every)
    step = _plain_step(plain)
    return Entry(
        name=contender.name,
        tokens_per_second=statistics.median(rates),
        lowest=min(rates),
        highest=max(rates),
        speedup=speedup_of_all(measured),
        prompts=measured,
        acceptance_rate=sum(run.decoded.accepted for run in every) / drafted if drafted else None,
        tokens_per_pass=sum(len(run.decoded.tokens) for run in every) / sum(run.decoded.target_passes for run in every),
        draft_cost=draft_seconds / drafted / step if drafted and step else None,
        draft_share=draft_seconds / sum(run.seconds for run in every),
        draft_bytes=contender.draft_bytes,
        peak_bytes=peak_bytes,
        training_seconds=contender.training_seconds,
        near_ties=sum(one.near_tie for one in measured),
        different=different,
    )


def _parts_at_near_tie(
    model: LayerSkipModel, prompt: EncodedPrompt, plain: Sequence[TimedRun], own: Sequence[TimedRun]
) -> bool | None:
    """Whether two outputs part at a near-tie; None where they part elsewhere."""
    try:
        return parts_at_near_tie(model, prompt, plain[0].decoded.tokens, own[0].decoded.tokens)
    except LosslessnessError:
        return None


def _rates(runs: Runs) -> list[float]:
    """Tokens per second over all prompts, of each repeat."""
    return [
        sum(len(run.decoded.tokens) for run in repeat) / sum(run.seconds for run in repeat)
        for repeat in zip(*runs.values(), strict=True)
    ]


def _plain_step(plain: Runs) -> float | None:
    """Seconds of one step of plain decoding; None if there was none behind the prompts."""
    every = [run.decoded for runs in plain.values() for run in runs]
    steps = sum(decoded.target_passes - 1 for decoded in every)
    return sum(decoded.step_seconds or 0.0 for decoded in every) / steps if steps else None
