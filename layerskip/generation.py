"""Generate tokens: prefill, then rounds of drafting and verification. Knows token ids and nothing of text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from layerskip.checks import instance, shown, whole_number
from layerskip.drafting.drafter import Drafter, NoDrafter, RoundResult
from layerskip.engine import EagerEngine, Engine, check_is_engine
from layerskip.errors import InvalidInputError
from layerskip.logits_processing import ProcessorSampling
from layerskip.model import LayerSkipModel
from layerskip.prefix_cache import PrefixCache
from layerskip.sampling import Sampling, check_numbers
from layerskip.utils import PhaseClock

# New tokens whose keys and values have room from the start; memory for more is taken when a text needs it.
_FIRST_ROOM = 1024

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass
class DecodingStats:
    """Counters and times of one generation.

    Attributes:
        rounds: Verification passes of the target model; in plain decoding, one for each token.
        drafted: Places in the text that tokens were proposed for; branches of a tree compete for the same place.
        accepted: Accepted tokens.
        tokens: Tokens in the output.
        reused: Tokens of the prompt that were not run, because their keys and values were cached.
        prefill_seconds: Time until the first token was chosen.
        draft_seconds: Time spent proposing.
        verification_seconds: Time spent in the target model's passes after the prompt's, and in accepting tokens.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    reused: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verification_seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted ÷ drafted; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def seconds(self) -> float:
        """Time in all phases."""
        return self.prefill_seconds + self.draft_seconds + self.verification_seconds

    @property
    def tokens_per_second(self) -> float:
        """Output tokens ÷ seconds, prefill included."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Generation:
    """A finished generation.

    Attributes:
        tokens: The new token ids, without the prompt. An end-of-sequence token, if any, is the last of them.
        finish_reason: ``"eos"``: an end-of-sequence token; ``"stop"``: the stop rule; ``"length"``:
            ``max_new_tokens``; ``"context"``: the model's context is full.
        stats: Counters and times.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    stats: DecodingStats = field(default_factory=DecodingStats)


@dataclass(frozen=True)
class Round:
    """The new tokens of one round of drafting and verification, or the first token, which the prompt's pass gives.

    Args:
        tokens: Their ids, at least one.
        accepted: How many of them were drafted: the first ones. The target model chose the others itself.
    """

    tokens: list[int]
    accepted: int


class GenerationOptions(TypedDict, total=False):
    """Options of :func:`generate`, :func:`stream` and :func:`stream_rounds`.

    Attributes:
        engine: Runs the model's passes, such as that of :func:`layerskip.make_engine`; by default a plain eager one.
        drafter: Proposes tokens to verify, such as ``profile.drafter(model)``; by default decoding is plain.
        sampling: How to choose tokens, such as a :class:`layerskip.Sampling`; by default greedily.
        max_new_tokens: Most tokens to generate, at least 1; by default 128.
        eos_token_ids: Tokens that end the text; by default those of the model's generation config.
        stop: Called with all new tokens after each one; true ends the text there.
        prompt_cache: Keys and values of an earlier text that the prompt may begin with, for instance a conversation so
            far; it then holds this text's. What it holds is not run again. That changes the output only as any change
            of a pass's width may: in float32 at a near-tie of the top two tokens. By default the whole prompt is run.
    """

    engine: Engine | None
    drafter: Drafter | None
    sampling: Sampling | ProcessorSampling | None
    max_new_tokens: int
    eos_token_ids: int | Collection[int] | None
    stop: Callable[[Sequence[int]], bool] | None
    prompt_cache: PrefixCache | None


def generate(
    model: LayerSkipModel,
    prompt: Tensor | Sequence[int],
    *,
    on_token: Callable[[int], None] | None = None,
    **options: Unpack[GenerationOptions],
) -> Generation:
    """Continue a prompt; the output is that of the target model, whatever the drafter.

    Args:
        model: The model.
        prompt: Token ids, ``[n]`` or ``[1, n]``.
        on_token: Called with each token as it is generated.
        **options: See :class:`GenerationOptions`.

    Returns:
        The new tokens with counters and times.

    Raises:
        InvalidInputError: The prompt is empty, a batch, longer than the model's context or has an id outside the
            vocabulary; ``max_new_tokens`` is below 1; the drafter is none, such as a profile itself; or the engine is
            another model's.
    """
    generation = Generation()
    for new in _rounds(generation, model, prompt, **options):
        for token in new.tokens:
            if on_token is not None:
                on_token(token)
    return generation


def stream(
    model: LayerSkipModel, prompt: Tensor | Sequence[int], **options: Unpack[GenerationOptions]
) -> Generator[int, None, Generation]:
    """Like :func:`generate`, but yield each token id as it is generated, and return the :class:`Generation`."""
    generation = Generation()
    for new in _rounds(generation, model, prompt, **options):
        yield from new.tokens
    return generation


def stream_rounds(
    model: LayerSkipModel, prompt: Tensor | Sequence[int], **options: Unpack[GenerationOptions]
) -> Generator[Round, None, Generation]:
    """Like :func:`stream`, but yield each :class:`Round`, which says which of its tokens were drafted."""
    generation = Generation()
    yield from _rounds(generation, model, prompt, **options)
    return generation


@torch.inference_mode()
def _rounds(
    generation: Generation,
    model: LayerSkipModel,
    prompt: Tensor | Sequence[int],
    *,
    engine: Engine | None = None,
    drafter: Drafter | None = None,
    sampling: Sampling | ProcessorSampling | None = None,
    max_new_tokens: int = 128,
    eos_token_ids: int | Collection[int] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    prompt_cache: PrefixCache | None = None,
) -> Iterator[Round]:
    """Prefill, then rounds of drafting and verification; the generation is filled in as they go."""
    instance("model", model, LayerSkipModel, "; wrap it: LayerSkipModel(model)")
    _check_options(sampling, stop, prompt_cache)
    ids = _prompt_ids(model, prompt)
    ending = _ending(model, len(ids), max_new_tokens, eos_token_ids, stop)
    sampler = (Sampling() if sampling is None else sampling).sampler(model.device)
    drafter, engine = _checked(drafter), _engine_of(model, engine)
    engine.check_current()
    room = min(ending.limit, _FIRST_ROOM)
    if prompt_cache is None:
        cache = engine.new_cache(len(ids) + room)
    else:
        cache = prompt_cache.reuse(engine, ids.tolist(), room)
    clock = PhaseClock(model.device)
    tokens, stats = generation.tokens, generation.stats
    stats.reused = cache.length

    with clock.phase("prefill"):
        scored = engine.prefill(ids[cache.length :], cache)
        newest = sampler.draw(scored.logits[0]).tokens  # [1]
        drafter.start(engine, ids, scored.states)
        first = newest.tolist()
        check_numbers(first)
        new, reason = ending.cut(tokens, first)
    tokens += new
    if prompt_cache is not None:
        prompt_cache.append(new)
    yield Round(new, accepted=0)

    while reason is None:
        past = cache.length
        with clock.phase("draft"):
            # A round gives one token more than its draft is deep.
            draft = drafter.propose(newest, cache, ending.limit - len(tokens) - 1, sampler)  # k tokens
            cache.rollback(past)
        with clock.phase("verification"):
            drafted = torch.cat([newest, draft.tokens])  # [k + 1], the rows of the draft's tree
            scored = engine.verify(drafted, cache, draft.shared, draft.tree)
            verdict = sampler.verify(draft, scored.logits)
            cache.compact(past, verdict.rows)
            drafter.observe(RoundResult(draft, verdict, drafted, scored))
        newest = verdict.newest
        new, reason = ending.cut(tokens, verdict.tokens)
        tokens += new
        if prompt_cache is not None:
            prompt_cache.append(new)
        accepted = min(verdict.accepted, len(new))
        stats.rounds += 1
        stats.drafted += draft.tree.depth
        stats.accepted += accepted
        yield Round(new, accepted)

    generation.finish_reason = reason
    stats.tokens = len(tokens)
    stats.prefill_seconds = clock.seconds("prefill")
    stats.draft_seconds = clock.seconds("draft")
    stats.verification_seconds = clock.seconds("verification")


def _check_options(sampling: object, stop: object, prompt_cache: object) -> None:
    if sampling is not None and (isinstance(sampling, type) or not hasattr(sampling, "sampler")):
        raise InvalidInputError(f"sampling: expected a layerskip.Sampling, got {shown(sampling)}")
    if stop is not None and not callable(stop):
        raise InvalidInputError(f"stop: expected a function of the new tokens, got {shown(stop)}")
    if prompt_cache is not None:
        instance("prompt_cache", prompt_cache, PrefixCache)


def _engine_of(model: LayerSkipModel, engine: Engine | None) -> Engine:
    if engine is None:
        return EagerEngine(model)
    check_is_engine(engine)
    if engine.model is not model:
        raise InvalidInputError(
            "engine: runs the passes of another model; make one for this model: make_engine(model, name)"
        )
    return engine


def _checked(drafter: Drafter | None) -> Drafter:
    if drafter is None:
        return NoDrafter()
    if isinstance(drafter, type):
        raise InvalidInputError(f"drafter: expected a drafter, got the class {drafter.__name__}; create an instance")
    if not hasattr(drafter, "propose"):
        raise InvalidInputError(
            f"drafter: expected a drafter, got {type(drafter).__name__}; a profile makes one: profile.drafter(model)"
        )
    return drafter


@dataclass(frozen=True)
class _Ending:
    """When a text ends."""

    eos: frozenset[int]
    stop: Callable[[Sequence[int]], bool] | None
    limit: int
    at_limit: FinishReason

    def cut(self, before: Sequence[int], new: Sequence[int]) -> tuple[list[int], FinishReason | None]:
        """The new tokens up to the one that ends the text, and why it ends there; all of them and None if none does."""
        text = list(before)
        for token in new:
            text.append(token)
            reason = self._reason(text)
            if reason is not None:
                return text[len(before) :], reason
        return list(new), None

    def _reason(self, text: Sequence[int]) -> FinishReason | None:
        if text[-1] in self.eos:
            return "eos"
        if self.stop is not None and self.stop(text):
            return "stop"
        return self.at_limit if len(text) >= self.limit else None


def _ending(
    model: LayerSkipModel,
    prompt_length: int,
    max_new_tokens: int,
    eos_token_ids: int | Collection[int] | None,
    stop: Callable[[Sequence[int]], bool] | None,
) -> _Ending:
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    if max_new_tokens < 1:
        raise InvalidInputError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    # The last new token needs no position of its own: nothing follows it.
    room = model.context_length - prompt_length + 1
    at_limit: FinishReason = "context" if room < max_new_tokens else "length"
    eos = model.eos_token_ids if eos_token_ids is None else _whole_numbers(eos_token_ids)
    return _Ending(eos, stop, min(max_new_tokens, room), at_limit)


def _whole_numbers(ids: Any) -> frozenset[int]:
    """Token ids that were given as a number or several, of Python's, numpy's or torch's types."""
    try:
        values = ids.reshape(-1).tolist() if hasattr(ids, "reshape") else ids
        return frozenset(map(index, values if isinstance(values, Iterable) else [values]))
    except TypeError as error:
        raise InvalidInputError(f"eos_token_ids: expected token ids, got {shown(ids)}") from error


def _prompt_ids(model: LayerSkipModel, prompt: Tensor | Sequence[int]) -> Tensor:
    """The prompt as ``[n]`` ids on the model's device."""
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"prompt: expected a row of token ids, got {type(prompt).__name__}: {error}") from error
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise InvalidInputError(
            f"prompt: expected the token ids of one text, shape [n] or [1, n], got shape {list(ids.shape)}; "
            "decode a batch one prompt at a time"
        )
    if not len(ids):
        raise InvalidInputError("prompt: expected at least one token, got none")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InvalidInputError(f"prompt: expected whole token ids, got {ids.dtype}")
    if len(ids) > model.context_length:
        raise InvalidInputError(
            f"prompt: {len(ids)} tokens do not fit the model's context of {model.context_length}; shorten the prompt"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.vocab_size:
        raise InvalidInputError(
            f"prompt: token id {low if low < 0 else high} is outside the vocabulary, 0 to {model.vocab_size - 1}"
        )
    return ids.to(model.device, torch.long)
