"""Decoding: prefill, then rounds of drafting and verification. Knows token ids and nothing of text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerskip.drafting.drafter import Drafter, NoDrafter, RoundResult
from layerskip.engine import EagerEngine, Engine
from layerskip.errors import InvalidInputError
from layerskip.generators import Drained
from layerskip.model import LayerSkipModel
from layerskip.prefix_cache import PrefixCache
from layerskip.sampling import Sampling, SamplingRule
from layerskip.utils import PhaseClock

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass
class DecodingStats:
    """What one generation did.

    Attributes:
        rounds: Verification passes of the target model; in plain decoding, one a token.
        drafted: Places in the text that tokens were proposed for; those of a tree that branches compete for one.
        accepted: Proposed tokens that stand in the output.
        tokens: Tokens in the output.
        reused: Tokens of the prompt that were not run, because their keys and values were at hand.
        prefill_seconds: Time until the first token was chosen.
        draft_seconds: Time spent proposing.
        verification_seconds: Time spent in the target model's passes behind the prompt, and deciding what stands.
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
        tokens: The new token ids, without the prompt. An end-of-sequence token, if one came, is the last of them.
        finish_reason: ``"eos"``: an end-of-sequence token; ``"stop"``: the stop rule; ``"length"``:
            ``max_new_tokens``; ``"context"``: the model's context is full.
        stats: Counters and times.
    """

    tokens: list[int]
    finish_reason: FinishReason
    stats: DecodingStats


@dataclass(frozen=True)
class Round:
    """Tokens that became certain together: those of a round of drafting and verification, or the first one of all.

    Args:
        tokens: Their ids, at least one.
        accepted: How many of them were drafted: the first ones. The target model chose the others itself.
    """

    tokens: list[int]
    accepted: int


def generate(
    model: LayerSkipModel,
    prompt: Tensor | Sequence[int],
    *,
    engine: Engine | None = None,
    drafter: Drafter | None = None,
    sampling: SamplingRule | None = None,
    max_new_tokens: int = 128,
    eos_token_ids: int | Collection[int] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continue a prompt; the output is that of the target model, whatever the drafter.

    Args:
        model: The model.
        prompt: Token ids, ``[n]`` or ``[1, n]``.
        engine: Runs the model's passes, such as :func:`layerskip.make_engine` makes one; None is a plain eager one.
        drafter: Proposes tokens to verify, such as ``profile.drafter(model)``; None decodes plainly.
        sampling: How to choose tokens, such as a :class:`layerskip.Sampling`; None is greedy.
        max_new_tokens: Most tokens to generate, at least 1.
        eos_token_ids: Tokens that end the text; None takes those of the model's generation config.
        stop: Called with all new tokens after each one; true ends the text there.
        on_token: Called with each token as it becomes certain.

    Returns:
        The new tokens with counters and times.

    Raises:
        InvalidInputError: The prompt is empty, a batch, longer than the model's context or has an id outside the
            vocabulary; ``max_new_tokens`` is below 1; the drafter is none, such as a profile itself; or the engine is
            another model's.
    """
    tokens = Drained(
        stream(
            model,
            prompt,
            engine=engine,
            drafter=drafter,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            stop=stop,
        )
    )
    for token in tokens:
        if on_token is not None:
            on_token(token)
    return tokens.returned


def stream(
    model: LayerSkipModel,
    prompt: Tensor | Sequence[int],
    *,
    engine: Engine | None = None,
    drafter: Drafter | None = None,
    sampling: SamplingRule | None = None,
    max_new_tokens: int = 128,
    eos_token_ids: int | Collection[int] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
) -> Generator[int, None, Generation]:
    """Like :func:`generate`, but yield each token id as it becomes certain, and return the :class:`Generation`."""
    rounds = Drained(
        stream_rounds(
            model,
            prompt,
            engine=engine,
            drafter=drafter,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            stop=stop,
        )
    )
    for one in rounds:
        yield from one.tokens
    return rounds.returned


@torch.inference_mode()
def stream_rounds(
    model: LayerSkipModel,
    prompt: Tensor | Sequence[int],
    *,
    engine: Engine | None = None,
    drafter: Drafter | None = None,
    sampling: SamplingRule | None = None,
    max_new_tokens: int = 128,
    eos_token_ids: int | Collection[int] | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    memory: PrefixCache | None = None,
) -> Generator[Round, None, Generation]:
    """Like :func:`stream`, but yield each :class:`Round`, which says which of its tokens were drafted.

    Args:
        model: As in :func:`generate`, like all that is not named here.
        memory: Keys and values of an earlier text that the prompt may begin with, for instance a conversation so far;
            it then holds this one's. What it holds is not run again. That changes the output only as every change of a
            pass's width may: in float32 at a near-tie of the two best tokens. None runs the whole prompt.
    """
    ids = _prompt_ids(model, prompt)
    ending = _ending(model, len(ids), max_new_tokens, eos_token_ids, stop)
    sampler = (sampling or Sampling()).sampler(model.device)
    drafter = _checked(drafter)
    engine = _engine_of(model, engine)
    memory = memory or PrefixCache()
    cache = memory.begin(engine, ids.tolist(), ending.limit)
    clock = PhaseClock(model.device)
    stats = DecodingStats(reused=cache.length)

    with clock.phase("prefill"):
        behind = engine.prefill(ids[cache.length :], cache)
        newest = sampler.draw(behind.logits[0]).tokens  # [1]
        drafter.start(engine, ids, behind.states)
        tokens, reason = ending.cut([], newest.tolist())
    memory.append(tokens)
    yield Round(list(tokens), accepted=0)

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
            cache.keep(past, verdict.rows)
            drafter.observe(RoundResult(draft, verdict, drafted, scored))
        newest = verdict.newest
        certain, reason = ending.cut(tokens, verdict.tokens)
        tokens += certain
        memory.append(certain)
        accepted = min(verdict.accepted, len(certain))
        stats.rounds += 1
        stats.drafted += draft.tree.depth
        stats.accepted += accepted
        yield Round(certain, accepted)

    stats.tokens = len(tokens)
    stats.prefill_seconds = clock.seconds("prefill")
    stats.draft_seconds = clock.seconds("draft")
    stats.verification_seconds = clock.seconds("verification")
    return Generation(tokens, reason, stats)


def _engine_of(model: LayerSkipModel, engine: Engine | None) -> Engine:
    if engine is None:
        return EagerEngine(model)
    if engine.model is not model:
        raise InvalidInputError("engine: runs the passes of another model; make one of this: make_engine(model, name)")
    return engine


def _checked(drafter: Drafter | None) -> Drafter:
    if drafter is None:
        return NoDrafter()
    if isinstance(drafter, type):
        raise InvalidInputError(f"drafter: expected a drafter, got the class {drafter.__name__}; make one of it")
    if not hasattr(drafter, "propose"):
        raise InvalidInputError(
            f"drafter: expected a drafter, got {type(drafter).__name__}; a profile makes one: profile.drafter(model)"
        )
    return drafter


@dataclass(frozen=True)
class _Ending:
    """When a text is over."""

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
    if max_new_tokens < 1:
        raise InvalidInputError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if eos_token_ids is None:
        eos_token_ids = model.eos_token_ids
    elif isinstance(eos_token_ids, int):
        eos_token_ids = (eos_token_ids,)
    # The last new token needs no position of its own: nothing follows it.
    room = model.context_length - prompt_length + 1
    at_limit: FinishReason = "context" if room < max_new_tokens else "length"
    return _Ending(frozenset(eos_token_ids), stop, min(max_new_tokens, room), at_limit)


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
