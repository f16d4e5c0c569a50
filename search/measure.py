"""Measuring a candidate: the same prompts decoded plainly and self-speculatively, in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import wilcoxon

from layerskip.drafting.drafter import Drafter
from layerskip.engine import Engine
from layerskip.errors import LosslessnessError
from layerskip.generation import Generation, generate
from layerskip.model import LayerSkipModel
from layerskip.utils import device_seconds
from search.prompts import EncodedPrompt
from studies.statistics import speedup_of_all, speedup_of_prompt

# In float32 two passes of different width differ by rounding; logits closer than this are as good as equal.
_FLOAT32_TIE = 1e-3
# In shorter types rounding alone moves a logit by a few units in its last place.
_TIE_ROUNDINGS = 4

# A candidate is given up when it would do as badly by chance less often than this.
_HOPELESS = 0.1


@dataclass(frozen=True)
class PromptMeasurement:
    """One prompt, decoded both ways.

    Args:
        prompt: The prompt's id.
        plain_seconds: Time of plain decoding, prefill included.
        draft_seconds: Time of self-speculative decoding, prefill included.
        tokens: Tokens of plain decoding.
        draft_tokens: Tokens of self-speculative decoding; differs from ``tokens`` only behind a near-tie.
        drafted: Tokens proposed.
        accepted: Proposed tokens that stood.
        near_tie: Whether the outputs part where the target model's best tokens are as good as tied.
    """

    prompt: str
    plain_seconds: float
    draft_seconds: float
    tokens: int
    draft_tokens: int
    drafted: int
    accepted: int
    near_tie: bool

    @property
    def speedup(self) -> float:
        """Plain seconds ÷ self-speculative seconds, each for one token."""
        return speedup_of_prompt(self)


@dataclass(frozen=True)
class Summary:
    """Measurements of several prompts, taken together."""

    speedup: float
    speedup_low: float
    speedup_high: float
    acceptance_rate: float | None
    plain_tokens_per_second: float
    draft_tokens_per_second: float
    prompts: int
    near_ties: int


def warm_up(engine: Engine, drafter: Drafter, prompts: Sequence[EncodedPrompt], *, max_new_tokens: int) -> None:
    """Decode prompts both ways where an engine captures or compiles passes: that is no part of what is measured.

    Args:
        engine: Runs the passes of the model.
        drafter: The candidate's drafter.
        prompts: What will be measured. The longest goes first, so that caches grow at once.
        max_new_tokens: Most tokens for each.
    """
    if not engine.captures:
        return
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.tokens), reverse=True):
        for one in (drafter, None):
            generate(engine.model, prompt.tokens, engine=engine, drafter=one, max_new_tokens=max_new_tokens)


def measure_prompt(
    engine: Engine, prompt: EncodedPrompt, drafter: Drafter, *, max_new_tokens: int, plain_first: bool
) -> PromptMeasurement:
    """Decode one prompt greedily both ways and time each.

    Args:
        engine: Runs the passes of the model.
        prompt: What to continue.
        drafter: The candidate's drafter.
        max_new_tokens: Most tokens to generate.
        plain_first: Which of the two comes first; alternate it, so that a drifting clock favours neither.

    Raises:
        LosslessnessError: The outputs differ, and not at a near-tie.
    """
    model = engine.model
    drafters = {"plain": None, "draft": drafter}
    seconds: dict[str, float] = {}
    made: dict[str, Generation] = {}
    for side in ("plain", "draft") if plain_first else ("draft", "plain"):
        started = device_seconds(model.device)
        made[side] = generate(
            model, prompt.tokens, engine=engine, drafter=drafters[side], max_new_tokens=max_new_tokens
        )
        seconds[side] = device_seconds(model.device) - started
    plain, draft = made["plain"], made["draft"]
    return PromptMeasurement(
        prompt=prompt.id,
        plain_seconds=seconds["plain"],
        draft_seconds=seconds["draft"],
        tokens=len(plain.tokens),
        draft_tokens=len(draft.tokens),
        drafted=draft.stats.drafted,
        accepted=draft.stats.accepted,
        near_tie=parts_at_near_tie(model, prompt, plain.tokens, draft.tokens),
    )


def hopeless(speedups: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether a candidate is slower than the best one, by Wilcoxon's signed-rank test on the prompts that both did.

    Args:
        speedups: The candidate's, by the id of the prompt.
        best: The best candidate's.
    """
    differences = [speedup - best[prompt] for prompt, speedup in speedups.items() if prompt in best]
    if not any(differences) or sum(differences) > 0:
        return False
    return float(wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue) < _HOPELESS


def parts_at_near_tie(model: LayerSkipModel, prompt: EncodedPrompt, plain: Sequence[int], draft: Sequence[int]) -> bool:
    """Whether two outputs part, and do so where the target model gives both tokens as good as the same, best logit.

    Returns:
        False if the outputs are equal.

    Raises:
        LosslessnessError: The outputs part anywhere else.
    """
    if list(plain) == list(draft):
        return False
    at = next((i for i, (a, b) in enumerate(zip(plain, draft, strict=False)) if a != b), None)
    if at is not None:
        text = torch.tensor([*prompt.tokens, *plain[:at]], device=model.device)
        with torch.inference_mode():
            x = model.forward(text, model.new_cache(len(text)))
            logits = model.logits(x[:, -1:])[0]
        best = float(logits.max())
        tie = max(_FLOAT32_TIE, _TIE_ROUNDINGS * torch.finfo(model.dtype).eps * float(logits.abs().max()))
        if best - float(logits[[plain[at], draft[at]]].min()) <= tie:
            return True
    raise LosslessnessError(
        f"prompt {prompt.id}: self-speculative decoding left plain decoding at token {at if at is not None else 'end'} "
        "and not at a near-tie; this is a bug in layerskip, please report it"
    )


def summarize(measurements: Sequence[PromptMeasurement]) -> Summary:
    """Take the measurements of one candidate together.

    The speedup and its interval are those of :func:`studies.statistics.speedup_of_all`.
    """
    speedup = speedup_of_all(measurements)
    drafted = sum(m.drafted for m in measurements)
    return Summary(
        speedup=speedup.value,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        acceptance_rate=sum(m.accepted for m in measurements) / drafted if drafted else None,
        plain_tokens_per_second=sum(m.tokens for m in measurements) / sum(m.plain_seconds for m in measurements),
        draft_tokens_per_second=sum(m.draft_tokens for m in measurements) / sum(m.draft_seconds for m in measurements),
        prompts=len(measurements),
        near_ties=sum(m.near_tie for m in measurements),
    )
