"""Measuring a profile again: on this machine, on these prompts, several times each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerskip.drafting.drafter import Drafter
from layerskip.engine import Engine
from search.decoding_methods import DecodingMethod, layerskip_method
from search.interleaving import measurement, time_interleaved, warm_up
from search.machine_lock import MachineLock
from search.measure import PromptMeasurement, Summary, parts_at_near_tie, summarize
from search.prompts import EncodedPrompt


@dataclass(frozen=True)
class Bench:
    """What decoding some prompts measured, plainly and with a draft.

    Args:
        summary: Of all prompts, each with the medians of its repeats; the interval is over prompts.
        prompts: Each prompt, with the medians of its repeats.
        mean_accepted: Accepted tokens a round, τ; a round yields one more. None if there was no round.
    """

    summary: Summary
    prompts: tuple[PromptMeasurement, ...]
    mean_accepted: float | None


def bench(
    engine: Engine,
    drafter: Drafter,
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    repeats: int,
    quiet: MachineLock,
    on_prompt: Callable[[int], None],
) -> Bench:
    """Decode prompts both ways, interleaved: prompt by prompt, and in turn what comes first.

    Args:
        engine: Runs the passes of the model.
        drafter: The draft to measure.
        prompts: What to decode.
        max_new_tokens: Most tokens for each.
        repeats: How often each prompt is decoded both ways.
        quiet: Keeps searches on this machine waiting meanwhile.
        on_prompt: Called with the number of prompts decoded so far, counting repeats.

    Raises:
        LosslessnessError: The draft changed the output.
    """
    both = (
        DecodingMethod("plain", layerskip_method(engine, None)),
        DecodingMethod("draft", layerskip_method(engine, drafter)),
    )
    warm_up(engine, both, prompts, max_new_tokens=max_new_tokens)
    plain, draft = time_interleaved(
        engine, both, prompts, max_new_tokens=max_new_tokens, repeats=repeats, quiet=quiet, on_prompt=on_prompt
    )
    measured: list[PromptMeasurement] = []
    rounds = 0
    for prompt in prompts:
        one, other = plain[prompt.id], draft[prompt.id]
        near_tie = parts_at_near_tie(engine.model, prompt, one[0].decoded.tokens, other[0].decoded.tokens)
        measured.append(measurement(prompt.id, one, other, near_tie=near_tie))
        rounds += other[0].decoded.target_passes - 1  # the prompt's pass is no round
    accepted = sum(one.accepted for one in measured)
    return Bench(summarize(measured), tuple(measured), accepted / rounds if rounds else None)
