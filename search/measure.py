"""Time decoding methods: every prompt by every method, interleaved and repeated, with the machine to themselves."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch
from scipy.stats import wilcoxon

from layerskip.drafting.drafter import Drafter
from layerskip.engine import EagerEngine, Engine
from layerskip.errors import LosslessnessError
from layerskip.model import LayerSkipModel
from layerskip.profile import Measured, PromptSet
from layerskip.utils import device_name, device_seconds, library_versions
from search.decoding_methods import PLAIN, Decoded, DecodingMethod, layerskip_method
from search.machine_lock import MachineLock
from search.prompts import EncodedPrompt
from studies.statistics import speedup_of_all, speedup_of_prompt

# Enough that every kernel and buffer has been used once.
WARM_UP_TOKENS = 8

# In float32 two passes of different width differ by rounding; logits closer than this are a near-tie.
_FLOAT32_TIE = 1e-3
# In shorter types rounding alone moves a logit by a few units in its last place.
_TIE_ROUNDINGS = 4

# Significance level below which a draft is taken to be slower than the best one.
_HOPELESS = 0.1


@dataclass(frozen=True)
class MeasuringPlan:
    """What is decoded to measure a method.

    Args:
        prompts: At least one, in this order.
        max_new_tokens: Most tokens generated for each prompt.
        repeats: How often each method decodes each prompt.
    """

    prompts: Sequence[EncodedPrompt]
    max_new_tokens: int
    repeats: int = 1


@dataclass(frozen=True)
class TimedRun:
    """One prompt decoded once by one method, and the seconds that it took, prefill included."""

    decoded: Decoded
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """One prompt decoded by one method, and in turn by plain decoding.

    Greedy decoding generates the same tokens in each repeat; only the seconds differ, of which the median counts.

    Args:
        prompt: The prompt's id.
        plain: Runs of plain decoding, one for each repeat.
        draft: Runs of the method, one for each repeat.
        near_tie: Whether the outputs diverge at a near-tie of the target model's top two tokens.
        error: The outputs diverge anywhere else; None if they do not.
    """

    prompt: str
    plain: tuple[TimedRun, ...]
    draft: tuple[TimedRun, ...]
    near_tie: bool = False
    error: LosslessnessError | None = None

    @property
    def plain_seconds(self) -> float:
        """Median time of plain decoding."""
        return statistics.median(run.seconds for run in self.plain)

    @property
    def draft_seconds(self) -> float:
        """Median time of the method."""
        return statistics.median(run.seconds for run in self.draft)

    @property
    def tokens(self) -> int:
        """Tokens of plain decoding."""
        return len(self.plain[0].decoded.tokens)

    @property
    def draft_tokens(self) -> int:
        """Tokens of the method; differs from ``tokens`` only where the outputs diverge."""
        return len(self.draft[0].decoded.tokens)

    @property
    def drafted(self) -> int:
        """Tokens proposed in one run."""
        return self.draft[0].decoded.drafted

    @property
    def accepted(self) -> int:
        """Accepted tokens of one run."""
        return self.draft[0].decoded.accepted

    @property
    def rounds(self) -> int:
        """Verified drafts of one run: passes of the target model without the prompt's."""
        return self.draft[0].decoded.target_passes - 1

    @property
    def speedup(self) -> float:
        """Plain seconds ÷ the method's seconds, each for one token."""
        return speedup_of_prompt(self)


@dataclass(frozen=True)
class Summary:
    """Measurements of one draft on several prompts, taken together.

    Args:
        speedup: Of all prompts' total times.
        speedup_low: Lower end of its 95 % interval over prompts.
        speedup_high: Upper end.
        acceptance_rate: α, accepted ÷ drafted tokens; None if nothing was drafted.
        plain_tokens_per_second: Of plain decoding.
        draft_tokens_per_second: Of self-speculative decoding.
        prompts: Number of prompts.
        near_ties: Number of prompts whose outputs diverge at a near-tie.
    """

    speedup: float
    speedup_low: float
    speedup_high: float
    acceptance_rate: float | None
    plain_tokens_per_second: float
    draft_tokens_per_second: float
    prompts: int
    near_ties: int


def measure_methods(
    model: LayerSkipModel, methods: Sequence[DecodingMethod], plan: MeasuringPlan, lock: MachineLock
) -> Iterator[Sequence[Measurement]]:
    """Decode every prompt by every method, prompt by prompt; the methods take turns in who goes first.

    Nothing is decoded ahead of what was asked for, so that a caller can stop early.

    Args:
        model: The target model, which tells near-ties.
        methods: All to measure; the first is plain decoding.
        plan: What to decode, and how often.
        lock: Held while a prompt is decoded, and free between prompts unless the caller holds it.

    Yields:
        After each prompt the measurement of each method on it, with those repeats that are done.
    """
    with lock.exclusive():
        _warm_up(methods, plan)
    measured: dict[str, list[Measurement]] = {}
    for repeat, (number, prompt) in product(range(plan.repeats), enumerate(plan.prompts)):
        with lock.exclusive():
            runs = _in_turn(model, methods, prompt, plan.max_new_tokens, first=repeat + number)
        if prompt.id in measured:
            measured[prompt.id] = [
                replace(earlier, plain=(*earlier.plain, runs[0]), draft=(*earlier.draft, run))
                for earlier, run in zip(measured[prompt.id], runs, strict=True)
            ]
        else:
            measured[prompt.id] = [_measurement(model, prompt, runs[0], run) for run in runs]
        yield measured[prompt.id]


def measure_drafter(engine: Engine, drafter: Drafter, plan: MeasuringPlan, lock: MachineLock) -> Iterator[Measurement]:
    """Measure self-speculative decoding with a drafter, as :func:`measure_methods` does.

    Yields:
        After each prompt its measurement, with those repeats that are done.

    Raises:
        LosslessnessError: The draft changed the output, and not at a near-tie.
    """
    methods = [layerskip_method(PLAIN, engine, None), layerskip_method("draft", engine, drafter)]
    for _, measurement in measure_methods(engine.model, methods, plan, lock):
        if measurement.error is not None:
            raise measurement.error
        yield measurement


def _in_turn(
    model: LayerSkipModel, methods: Sequence[DecodingMethod], prompt: EncodedPrompt, max_new_tokens: int, *, first: int
) -> list[TimedRun]:
    """Decode a prompt by each method, beginning with the ``first``-th; the runs are in the methods' own order."""
    order = [(first + turn) % len(methods) for turn in range(len(methods))]
    runs = {at: timed(model, methods[at], prompt, max_new_tokens) for at in order}
    return [runs[at] for at in range(len(methods))]


def timed(model: LayerSkipModel, method: DecodingMethod, prompt: EncodedPrompt, max_new_tokens: int) -> TimedRun:
    """Decode a prompt once, and take the time."""
    started = device_seconds(model.device)
    decoded = method.decode(prompt.tokens, max_new_tokens)
    return TimedRun(decoded, device_seconds(model.device) - started)


def _warm_up(methods: Sequence[DecodingMethod], plan: MeasuringPlan) -> None:
    """Decode until nothing is done for the first time: kernels chosen, passes captured or compiled, caches grown."""
    for method in methods:
        method.decode(plan.prompts[0].tokens, min(plan.max_new_tokens, WARM_UP_TOKENS))
    # The longest prompt goes first, so that caches grow at once.
    for prompt in sorted(plan.prompts, key=lambda prompt: len(prompt.tokens), reverse=True):
        for method in methods:
            if method.compiles:
                method.decode(prompt.tokens, plan.max_new_tokens)


def _measurement(model: LayerSkipModel, prompt: EncodedPrompt, plain: TimedRun, draft: TimedRun) -> Measurement:
    try:
        near_tie = diverges_at_near_tie(model, prompt, plain.decoded.tokens, draft.decoded.tokens)
    except LosslessnessError as error:
        return Measurement(prompt.id, (plain,), (draft,), error=error)
    return Measurement(prompt.id, (plain,), (draft,), near_tie=near_tie)


def diverges_at_near_tie(
    model: LayerSkipModel, prompt: EncodedPrompt, plain: Sequence[int], draft: Sequence[int]
) -> bool:
    """Whether two outputs diverge where the target model's best logit and those of both tokens are a near-tie.

    Args:
        model: The target model.
        prompt: What both continue.
        plain: Tokens of plain decoding.
        draft: Tokens of the other method.

    Returns:
        False if the outputs are equal.

    Raises:
        LosslessnessError: The outputs diverge anywhere else.
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
        f"prompt {prompt.id}: self-speculative decoding diverges from plain decoding at token "
        f"{at if at is not None else 'end'} and not at a near-tie; this is a bug in layerskip, please report it"
    )


def hopeless(speedups: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether a draft is slower than the best one, by Wilcoxon's signed-rank test on the prompts that both decoded.

    Args:
        speedups: The draft's, by the id of the prompt.
        best: The best draft's.
    """
    differences = [speedup - best[prompt] for prompt, speedup in speedups.items() if prompt in best]
    if not any(differences) or sum(differences) > 0:
        return False
    return float(wilcoxon(differences, alternative="less", zero_method="zsplit").pvalue) < _HOPELESS


def summarize(measurements: Sequence[Measurement]) -> Summary:
    """Take the measurements of one draft together, at least one.

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


def as_measured(summary: Summary, prompt_set: PromptSet, max_new_tokens: int, engine: Engine) -> Measured:
    """The figures of a summary as a draft profile has them.

    Args:
        summary: The figures.
        prompt_set: The prompts that were measured.
        max_new_tokens: Most tokens generated for each prompt.
        engine: Ran the passes.
    """
    figures = asdict(summary)
    figures["speculative_tokens_per_second"] = figures.pop("draft_tokens_per_second")
    return Measured(
        **figures,
        prompt_set=prompt_set,
        max_new_tokens=max_new_tokens,
        device=describe_device(engine),
        dtype=dtype_name(engine.model),
        versions=library_versions(),
    )


def describe_device(engine: Engine) -> str:
    """The name of the device, and of the engine if it is not eager."""
    parts = [device_name(engine.model.device)]
    parts += [engine.name] * (engine.name != EagerEngine.name)
    parts += ["compiled"] * engine.model.compiled
    return ", ".join(parts)


def dtype_name(model: LayerSkipModel) -> str:
    """The name of a model's floating-point type, such as ``float32``."""
    return str(model.dtype).removeprefix("torch.")


def mean_accepted_length(measurements: Sequence[Measurement]) -> float | None:
    """Accepted tokens a round; a round yields one more. None if there was no round."""
    rounds = sum(m.rounds for m in measurements)
    return sum(m.accepted for m in measurements) / rounds if rounds else None
