"""Measuring a profile again: on this machine, on these prompts, several times each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from layerskip.decoding.drafting import Drafter
from layerskip.decoding.loop import generate
from layerskip.stack.model import LayerSkipModel
from search.measure import Pair, PromptMeasurement, Summary, decode_both, measurement_of, summarize, warm_up
from search.prompts import EncodedPrompt
from search.quiet import Quiet

# Enough that every kernel and buffer has been used once.
_WARM_UP_TOKENS = 8


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
    model: LayerSkipModel,
    drafter: Drafter,
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    repeats: int,
    quiet: Quiet,
    on_prompt: Callable[[int], None],
) -> Bench:
    """Decode prompts both ways, interleaved: prompt by prompt, and in turn what comes first.

    Args:
        model: The model.
        drafter: The draft to measure.
        prompts: What to decode.
        max_new_tokens: Most tokens for each.
        repeats: How often each prompt is decoded both ways.
        quiet: Keeps searches on this machine waiting meanwhile.
        on_prompt: Called with the number of prompts decoded so far, counting repeats.

    Raises:
        LosslessnessError: The draft changed the output.
    """
    for one in (None, drafter):
        generate(model, prompts[0].tokens, drafter=one, max_new_tokens=_WARM_UP_TOKENS)
    warm_up(model, drafter, prompts, max_new_tokens=max_new_tokens)
    pairs: dict[str, list[Pair]] = {prompt.id: [] for prompt in prompts}
    for done in range(repeats * len(prompts)):
        repeat, number = divmod(done, len(prompts))
        prompt, plain_first = prompts[number], (repeat + number) % 2 == 0
        with quiet.alone():
            pair = decode_both(model, prompt, drafter, max_new_tokens=max_new_tokens, plain_first=plain_first)
        pairs[prompt.id].append(pair)
        on_prompt(done + 1)
    measured = tuple(_with_medians(model, prompt, pairs[prompt.id]) for prompt in prompts)
    rounds = sum(pairs[prompt.id][0].draft.stats.rounds for prompt in prompts)
    accepted = sum(one.accepted for one in measured)
    return Bench(summarize(measured), measured, accepted / rounds if rounds else None)


def _with_medians(model: LayerSkipModel, prompt: EncodedPrompt, pairs: Sequence[Pair]) -> PromptMeasurement:
    """One prompt's repeats as one: greedy decoding says the same each time, only the seconds differ."""
    return replace(
        measurement_of(model, prompt, pairs[0]),
        plain_seconds=statistics.median(pair.plain_seconds for pair in pairs),
        draft_seconds=statistics.median(pair.draft_seconds for pair in pairs),
    )
