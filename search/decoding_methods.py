"""A decoding method: something that continues a prompt greedily, by layerskip or by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from layerskip.drafting.drafter import Drafter
from layerskip.engine import Engine
from layerskip.generation import generate
from layerskip.model import LayerSkipModel
from layerskip.prefix_cache import PrefixCache
from layerskip.utils import PhaseClock
from search.prompts import EncodedPrompt

# layerskip's plain decoding, which all other methods are compared with.
PLAIN = "plain decoding"


@dataclass(frozen=True)
class Decoded:
    """The tokens that a method generated for one prompt, and what it took.

    Args:
        tokens: The new token ids.
        target_passes: Passes of the target model, the prompt's among them.
        drafted: Places in the text that tokens were proposed for.
        accepted: Proposed tokens that were accepted.
        draft_seconds: Time spent proposing.
        step_seconds: Time spent in the target model's passes after the prompt's; None where it was not taken.
        lengths: How many of the tokens are each turn's, where a conversation was decoded.
    """

    tokens: tuple[int, ...]
    target_passes: int
    drafted: int
    accepted: int
    draft_seconds: float
    step_seconds: float | None
    lengths: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Passes of the target model without those of the prompts."""
        return self.target_passes - len(self.answers)

    @property
    def answers(self) -> list[tuple[int, ...]]:
        """The tokens of each turn."""
        ends = [*accumulate(self.lengths or (len(self.tokens),))]
        return [self.tokens[start:end] for start, end in zip((0, *ends), ends, strict=False)]


Decode = Callable[[Sequence[int], int], Decoded]


@dataclass(frozen=True)
class DecodingMethod:
    """A way to decode greedily.

    Args:
        name: What it is called.
        decode: Continues a prompt by a number of tokens at most.
        draft_bytes: Extra memory of its draft.
        training_seconds: How long its draft was trained, if that is known.
        compiles: Whether it captures or compiles passes for each length of text, which is not to be timed.
        third_party: Whether it is another library's code, which may refuse this model.
        new_conversation: Makes what decodes the turns of one conversation, without running again what they begin with;
            None decodes each from its beginning.
    """

    name: str
    decode: Decode = field(repr=False)
    draft_bytes: int = 0
    training_seconds: float | None = None
    compiles: bool = False
    third_party: bool = False
    new_conversation: Callable[[], Decode] | None = field(default=None, repr=False)

    def decode_turns(self, prompt: EncodedPrompt, max_new_tokens: int) -> Decoded:
        """Decode all turns of a prompt, each by a number of tokens at most."""
        if not prompt.earlier:
            return self.decode(prompt.tokens, max_new_tokens)
        decode = self.decode if self.new_conversation is None else self.new_conversation()
        return _joined([decode(turn, max_new_tokens) for turn in prompt.turns])


def _joined(turns: Sequence[Decoded]) -> Decoded:
    steps = [turn.step_seconds for turn in turns if turn.step_seconds is not None]
    return Decoded(
        tokens=tuple(chain.from_iterable(turn.tokens for turn in turns)),
        target_passes=sum(turn.target_passes for turn in turns),
        drafted=sum(turn.drafted for turn in turns),
        accepted=sum(turn.accepted for turn in turns),
        draft_seconds=sum(turn.draft_seconds for turn in turns),
        step_seconds=sum(steps) if steps else None,
        lengths=tuple(len(turn.tokens) for turn in turns),
    )


def layerskip_method(
    name: str,
    engine: Engine,
    drafter: Drafter | None,
    *,
    draft_bytes: int = 0,
    training_seconds: float | None = None,
) -> DecodingMethod:
    """layerskip's decoding.

    Args:
        name: What it is called.
        engine: Runs the passes of the model.
        drafter: Drafts for it; None is plain decoding.
        draft_bytes: As in :class:`DecodingMethod`.
        training_seconds: Likewise.
    """

    def decode(prompt: Sequence[int], max_new_tokens: int, prompt_cache: PrefixCache | None = None) -> Decoded:
        generation = generate(
            engine.model,
            prompt,
            engine=engine,
            drafter=drafter,
            max_new_tokens=max_new_tokens,
            prompt_cache=prompt_cache,
        )
        stats = generation.stats
        return Decoded(
            tuple(generation.tokens),
            target_passes=stats.rounds + 1,
            drafted=stats.drafted,
            accepted=stats.accepted,
            draft_seconds=stats.draft_seconds,
            step_seconds=stats.verification_seconds,
        )

    return DecodingMethod(
        name,
        decode,
        draft_bytes,
        training_seconds,
        compiles=engine.captures,
        new_conversation=lambda: partial(decode, prompt_cache=PrefixCache()),
    )


def transformers_method(name: str, model: LayerSkipModel, *, draft_bytes: int = 0, **options: Any) -> DecodingMethod:
    """``generate`` of transformers.

    Args:
        name: What it is called.
        model: The model.
        draft_bytes: As in :class:`DecodingMethod`.
        options: Of ``generate``, such as ``assistant_model`` or ``prompt_lookup_num_tokens``.
    """
    hf_model: Any = model.hf_model
    eos = sorted(model.eos_token_ids)
    # Greedy, whatever the checkpoint recommends: that is what all methods are compared on.
    greedy = GenerationConfig(do_sample=False, eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0)

    def decode(prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        ids = torch.tensor([list(prompt)], device=model.device)
        tally = _Tally(PhaseClock(model.device))
        with (
            _settings(hf_model, greedy),
            _passes_counted(hf_model, tally),
            _candidates_counted(hf_model, tally),
        ):
            output = hf_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options
            )
        return Decoded(
            tuple(output[0, len(prompt) :].tolist()),
            target_passes=tally.target_passes,
            drafted=tally.drafted,
            accepted=tally.accepted,
            draft_seconds=tally.clock.seconds("draft"),
            step_seconds=None,
        )

    compiles = options.get("cache_implementation") == "static"
    return DecodingMethod(name, decode, draft_bytes, compiles=compiles, third_party=True)


@dataclass
class _Tally:
    """Counts and times what transformers does."""

    clock: PhaseClock
    target_passes: int = 0
    drafted: int = 0
    accepted: int = 0


@contextmanager
def _settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's defaults for ``generate`` inside the block."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _passes_counted(model: PreTrainedModel, tally: _Tally) -> Iterator[None]:
    config: Any = model.base_model.config
    depth = config.num_hidden_layers

    def count(module: nn.Module, *_: Any) -> None:
        # An early exit of transformers shortens the model's configuration while it drafts.
        tally.target_passes += config.num_hidden_layers == depth

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
        config.num_hidden_layers = depth  # where drafting failed halfway


@contextmanager
def _candidates_counted(model: Any, tally: _Tally) -> Iterator[None]:
    """Count and time the tokens that an assisted mode proposes, and count those that are accepted."""
    original = model._get_candidate_generator

    def counted(*arguments: Any, **named: Any) -> Any:
        generator = original(*arguments, **named)
        propose, update = generator.get_candidates, generator.update_candidate_strategy

        def get_candidates(input_ids: Tensor, *rest: Any, **more: Any) -> Any:
            with tally.clock.phase("draft"):
                proposed = propose(input_ids, *rest, **more)
            tally.drafted += proposed[0].shape[1] - input_ids.shape[1]
            return proposed

        def update_candidate_strategy(input_ids: Tensor, scores: Tensor, num_matches: int) -> Any:
            tally.accepted += int(num_matches)
            return update(input_ids, scores, num_matches)

        generator.get_candidates, generator.update_candidate_strategy = get_candidates, update_candidate_strategy
        return generator

    model._get_candidate_generator = counted
    try:
        yield
    finally:
        del model._get_candidate_generator
