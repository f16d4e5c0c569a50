"""Decoding the same prompts in several ways, so interleaved that a machine's moods favour none."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from layerskip.engine import Engine
from layerskip.utils import device_seconds
from search.decoding_methods import Decoded, DecodingMethod
from search.machine_lock import MachineLock
from search.measure import PromptMeasurement
from search.prompts import EncodedPrompt

# Enough that every kernel and buffer has been used once.
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class TimedRun:
    """What decoding a prompt came to, and how long it took in seconds, prefill included."""

    decoded: Decoded
    seconds: float


# Of one contender: each prompt's repeats, by its id.
Runs = Mapping[str, Sequence[TimedRun]]


def warm_up(
    engine: Engine,
    contenders: Sequence[DecodingMethod],
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
) -> None:
    """Decode until nothing is done for the first time: kernels chosen, passes captured or compiled, caches grown.

    Args:
        engine: Runs the passes of the model.
        contenders: Who will decode.
        prompts: What will be decoded. The longest goes first, so that caches grow at once.
        max_new_tokens: Most tokens for each.
    """
    for contender in contenders:
        contender.decode(prompts[0].tokens, min(max_new_tokens, WARM_UP_TOKENS))
    if engine.captures or engine.model.device.type == "cuda":
        for prompt in sorted(prompts, key=lambda prompt: len(prompt.tokens), reverse=True):
            for contender in contenders:
                contender.decode(prompt.tokens, max_new_tokens)


def time_interleaved(
    engine: Engine,
    contenders: Sequence[DecodingMethod],
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    repeats: int,
    quiet: MachineLock,
    on_prompt: Callable[[int], None],
) -> list[Runs]:
    """Decode every prompt with every contender, prompt by prompt, and in turn who comes first.

    Args:
        engine: Runs the passes of the model.
        contenders: Who decodes.
        prompts: What to decode.
        max_new_tokens: Most tokens for each.
        repeats: How often each prompt is decoded by each.
        quiet: Keeps searches on this machine waiting meanwhile.
        on_prompt: Called with the number of prompts decoded by all so far, counting repeats.

    Returns:
        The runs of each contender, in their order.
    """
    runs: list[dict[str, list[TimedRun]]] = [{prompt.id: [] for prompt in prompts} for _ in contenders]
    for done in range(repeats * len(prompts)):
        repeat, number = divmod(done, len(prompts))
        prompt = prompts[number]
        with quiet.exclusive():
            for turn in range(len(contenders)):
                at = (repeat + number + turn) % len(contenders)
                runs[at][prompt.id].append(timed(engine, contenders[at], prompt, max_new_tokens))
        on_prompt(done + 1)
    return list(runs)


def timed(engine: Engine, contender: DecodingMethod, prompt: EncodedPrompt, max_new_tokens: int) -> TimedRun:
    """Decode a prompt once, and take the time."""
    started = device_seconds(engine.model.device)
    decoded = contender.decode(prompt.tokens, max_new_tokens)
    return TimedRun(decoded, device_seconds(engine.model.device) - started)


def measurement(
    prompt: str, plain: Sequence[TimedRun], other: Sequence[TimedRun], *, near_tie: bool
) -> PromptMeasurement:
    """A prompt's repeats as one: greedy decoding says the same each time, only the seconds differ.

    Args:
        prompt: The prompt's id.
        plain: The runs of plain decoding.
        other: Those that are held against it.
        near_tie: Whether the outputs part at a near-tie.
    """
    decoded = other[0].decoded
    return PromptMeasurement(
        prompt=prompt,
        plain_seconds=statistics.median(run.seconds for run in plain),
        draft_seconds=statistics.median(run.seconds for run in other),
        tokens=len(plain[0].decoded.tokens),
        draft_tokens=len(decoded.tokens),
        drafted=decoded.drafted,
        accepted=decoded.accepted,
        near_tie=near_tie,
    )
