"""Time decoding methods: every prompt by every method, interleaved and repeated, with the machine to themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product

import torch

from layerskip.drafting.config import DraftConfig
from layerskip.drafting.drafter import Drafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine, Engine
from layerskip.errors import LosslessnessError
from layerskip.model import LayerSkipModel
from layerskip.profile import Measured, PromptSet
from layerskip.utils import device_name, device_seconds, dtype_name, library_versions
from search.decoding_methods import PLAIN, Decoded, DecodingMethod, layerskip_method
from search.machine_lock import MachineLock
from search.prompts import EncodedPrompt
from studies.records import MeasurementRecord
from studies.statistics import speedup_of_all, speedup_of_prompt

# Enough that every kernel and buffer has been used once.
WARM_UP_TOKENS = 8

# In float32 two passes of different width differ by rounding; logits closer than this are a near-tie.
_FLOAT32_TIE = 1e-3
# In shorter types rounding alone moves a logit by a few units in its last place, and keys and values that passes of
# different width wrote differ as well: three times as much is no bug yet.
_TIE_ROUNDINGS = 3 * 4

# The fastest of some runs is trusted if another run, or what was expected, comes this close to it.
_AGREEMENT = 1.1
# Runs beyond those asked for, where they do not agree.
_MOST_AGAIN = 3

# Seconds that a method is expected to take, by the prompt's id.
ExpectedSeconds = Mapping[str, float]


@dataclass(frozen=True)
class MeasuringPlan:
    """What is decoded to measure a method.

    Args:
        prompts: At least one, in this order.
        max_new_tokens: Most tokens generated for each prompt.
        repeats: How often each method decodes each prompt, at least.
        expected: Seconds that methods are expected to take, by their names.
        known_plain: Earlier runs of plain decoding by the prompt's id, which count as this measurement's, but for those
            of the first prompt: if plain decoding of that is slower now, none counts.
    """

    prompts: Sequence[EncodedPrompt]
    max_new_tokens: int
    repeats: int = 1
    expected: Mapping[str, ExpectedSeconds] = field(default_factory=dict)
    known_plain: Mapping[str, Sequence[TimedRun]] = field(default_factory=dict)


@dataclass(frozen=True)
class TimedRun:
    """One prompt decoded once by one method, and the seconds that it took, prefill included."""

    decoded: Decoded
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """One prompt decoded by one method, and in turn by plain decoding.

    Greedy decoding generates the same tokens in each repeat; only the seconds differ, of which the fewest count: other
    processes can make a run slower, never faster.

    Args:
        prompt: The prompt's id.
        plain: Runs of plain decoding, one for each repeat.
        draft: Runs of the method, one for each repeat.
        near_tie: Whether the outputs diverge at a near-tie of the target model's top two tokens.
        disturbed: Whether runs still differed after some more, because the machine was busy: the figures are uncertain.
        error: The outputs diverge anywhere else; None if they do not.
    """

    prompt: str
    plain: tuple[TimedRun, ...]
    draft: tuple[TimedRun, ...]
    near_tie: bool = False
    disturbed: bool = False
    error: LosslessnessError | None = None

    @property
    def plain_seconds(self) -> float:
        """Time of the fastest run of plain decoding."""
        return min(run.seconds for run in self.plain)

    @property
    def draft_seconds(self) -> float:
        """Time of the method's fastest run."""
        return min(run.seconds for run in self.draft)

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
        """Verified drafts of one run: passes of the target model without the prompts'."""
        return self.draft[0].decoded.steps

    @property
    def target_passes(self) -> int:
        """Passes of the target model of one run."""
        return self.draft[0].decoded.target_passes

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
        disturbed: Number of prompts whose times are uncertain, because the machine was busy.
    """

    speedup: float
    speedup_low: float
    speedup_high: float
    acceptance_rate: float | None
    plain_tokens_per_second: float
    draft_tokens_per_second: float
    prompts: int
    near_ties: int
    disturbed: int = 0


def measure_methods(
    model: LayerSkipModel, methods: Sequence[DecodingMethod], plan: MeasuringPlan, lock: MachineLock
) -> Iterator[Sequence[Measurement]]:
    """Decode every prompt by every method, prompt by prompt; the methods take turns in who goes first.

    A run is trusted if another run of the same method and prompt, or what was expected, confirms it; after the last
    repeat, a prompt is decoded again by those methods whose runs are not, a few times at most. Nothing is decoded ahead
    of what was asked for, so that a caller can stop early.

    Args:
        model: The target model, which tells near-ties.
        methods: All to measure; the first is plain decoding.
        plan: What to decode, and how often.
        lock: Held while a prompt is decoded, and free between prompts unless the caller holds it.

    Yields:
        After each prompt the measurement of each method on it, with those repeats that are done.
    """
    with lock.exclusive():
        _warm_up(methods, plan, on_cuda=model.device.type == "cuda")
    known = dict(plan.known_plain)
    runs: dict[str, list[list[TimedRun]]] = {prompt.id: [[] for _ in methods] for prompt in plan.prompts}
    for repeat, (number, prompt) in product(range(plan.repeats), enumerate(plan.prompts)):
        by_method = runs[prompt.id]
        expected = [plan.expected.get(method.name, {}).get(prompt.id) for method in methods]
        # Without plain decoding, where that is known.
        waiting = list(range(int(number > 0 and prompt.id in known), len(methods)))
        again = _MOST_AGAIN if repeat == plan.repeats - 1 else 0
        for attempt in range(1 + again):
            first = (repeat + number + attempt) % len(waiting)
            with lock.exclusive():
                for at in (*waiting[first:], *waiting[:first]):
                    by_method[at].append(timed(model, methods[at], prompt, plan.max_new_tokens))
            waiting = [at for at in waiting if not _is_trusted(by_method[at], expected[at])]
            if not waiting:
                break
        if number == 0 and prompt.id in known and _fastest(by_method[0]) > _AGREEMENT * _fastest(known[prompt.id]):
            known.clear()  # the machine is slower than it was
        plain = (*known.get(prompt.id, ()), *by_method[0])
        measured = [_measurement(model, prompt, plain, tuple(own)) for own in (plain, *by_method[1:])]
        yield [replace(measurement, disturbed=bool(waiting) and again > 0) for measurement in measured]


def _fastest(runs: Sequence[TimedRun]) -> float:
    return min(run.seconds for run in runs)


def _is_trusted(runs: Sequence[TimedRun], expected: float | None) -> bool:
    """Whether the fastest of some runs is confirmed by what was expected, in seconds, or by another run."""
    fastest, *others = sorted(run.seconds for run in runs)
    as_expected = expected is not None and fastest <= _AGREEMENT * expected
    return as_expected or (bool(others) and others[0] <= _AGREEMENT * fastest)


def measure_drafters(
    engine: Engine, drafters: Mapping[str, Drafter], plan: MeasuringPlan, lock: MachineLock
) -> Iterator[Mapping[str, Measurement]]:
    """Measure self-speculative decoding with drafters, as :func:`measure_methods` does.

    Args:
        engine: Runs the passes of the model.
        drafters: By name.
        plan: As there.
        lock: As there.

    Yields:
        After each prompt the measurement of each drafter on it, with those repeats that are done.

    Raises:
        LosslessnessError: A draft changed the output, and not at a near-tie.
    """
    methods = [layerskip_method(PLAIN, engine, None)]
    methods += [layerskip_method(name, engine, drafter) for name, drafter in drafters.items()]
    for _, *measurements in measure_methods(engine.model, methods, plan, lock):
        for measurement in measurements:
            if measurement.error is not None:
                raise measurement.error
        yield dict(zip(drafters, measurements, strict=True))


def timed(model: LayerSkipModel, method: DecodingMethod, prompt: EncodedPrompt, max_new_tokens: int) -> TimedRun:
    """Decode a prompt once, and take the time."""
    started = device_seconds(model.device)
    decoded = method.decode_turns(prompt, max_new_tokens)
    return TimedRun(decoded, device_seconds(model.device) - started)


def _warm_up(methods: Sequence[DecodingMethod], plan: MeasuringPlan, *, on_cuda: bool) -> None:
    """Decode until nothing is done for the first time: kernels chosen, passes captured or compiled, caches grown.

    On CUDA libraries choose kernels by the shapes of a pass, at its first run.
    """
    for method in methods:
        method.decode_turns(plan.prompts[0], min(plan.max_new_tokens, WARM_UP_TOKENS))
    # The longest prompt goes first, so that caches grow at once.
    for prompt in sorted(plan.prompts, key=lambda prompt: len(prompt.tokens), reverse=True):
        for method in methods:
            if method.compiles or on_cuda:
                method.decode_turns(prompt, plan.max_new_tokens)


def _measurement(
    model: LayerSkipModel, prompt: EncodedPrompt, plain: tuple[TimedRun, ...], draft: tuple[TimedRun, ...]
) -> Measurement:
    answers = zip(prompt.turns, plain[0].decoded.answers, draft[0].decoded.answers, strict=True)
    try:
        near_ties = [
            diverges_at_near_tie(model, EncodedPrompt(prompt.id, turn), ours, theirs) for turn, ours, theirs in answers
        ]
    except LosslessnessError as error:
        return Measurement(prompt.id, plain, draft, error=error)
    return Measurement(prompt.id, plain, draft, near_tie=any(near_ties))


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
        disturbed=sum(m.disturbed for m in measurements),
    )


def as_measured(
    summary: Summary, prompt_set: PromptSet, max_new_tokens: int, engine: Engine, *, draft_bytes: int
) -> Measured:
    """The figures of a summary as a draft profile has them.

    Args:
        summary: The figures.
        prompt_set: The prompts that were measured.
        max_new_tokens: Most tokens generated for each prompt.
        engine: Ran the passes.
        draft_bytes: From :func:`draft_bytes`.
    """
    figures = asdict(summary)
    figures["speculative_tokens_per_second"] = figures.pop("draft_tokens_per_second")
    return Measured(
        **figures,
        draft_bytes=draft_bytes,
        prompt_set=prompt_set,
        max_new_tokens=max_new_tokens,
        device=describe_device(engine),
        dtype=dtype_name(engine.model.dtype),
        versions=library_versions(),
    )


def as_record(measurement: Measurement, study: str, trial: int, prompt_set: PromptSet) -> MeasurementRecord:
    """A measurement of a trial's draft, as a row of the study's database."""
    return MeasurementRecord(
        study=study,
        trial=trial,
        prompt=measurement.prompt,
        prompt_set=prompt_set,
        plain_seconds=measurement.plain_seconds,
        draft_seconds=measurement.draft_seconds,
        tokens=measurement.tokens,
        draft_tokens=measurement.draft_tokens,
        drafted=measurement.drafted,
        accepted=measurement.accepted,
        near_tie=measurement.near_tie,
        disturbed=measurement.disturbed,
    )


def draft_bytes(model: LayerSkipModel, config: DraftConfig, weights: DraftWeights) -> int:
    """Memory that a draft takes in addition to the model's.

    Its weights count, the head's rows for its draft vocabulary, and copies at lower precision.

    Args:
        model: The model, whose dtype the weights are converted to.
        config: How it drafts.
        weights: The draft's weights.
    """
    numbers, ids = sum(weight.numel() for weight in weights.parameters()), weights.token_ids
    if ids is not None:
        numbers += len(ids) * model.config.hidden_size
    copies = model.copies.bytes_needed(config.precision, config.skip_set.kept)
    return numbers * model.dtype.itemsize + (0 if ids is None else ids.nbytes) + copies


def describe_device(engine: Engine) -> str:
    """The name of the device, and of the engine if it is not eager."""
    parts = [device_name(engine.model.device)]
    parts += [engine.name] * (engine.name != EagerEngine.name)
    parts += ["compiled"] * engine.model.compiled
    return ", ".join(parts)


def mean_accepted_length(measurements: Sequence[Measurement]) -> float | None:
    """Accepted tokens a round; a round yields one more. None if there was no round."""
    rounds = sum(m.rounds for m in measurements)
    return sum(m.accepted for m in measurements) / rounds if rounds else None
