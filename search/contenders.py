"""Ways to decode a prompt greedily, each counted and timed alike: layerskip's, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from layerskip.decoding.drafting import Drafter
from layerskip.decoding.loop import generate
from layerskip.stack.model import LayerSkipModel
from layerskip.timing import PhaseClock


@dataclass(frozen=True)
class Decoded:
    """What decoding one prompt came to.

    Args:
        tokens: The new token ids.
        full_passes: Passes of the full model, the prompt's among them.
        drafted: Places in the text that tokens were proposed for.
        accepted: Proposed tokens that stood.
        draft_seconds: Time spent proposing.
        step_seconds: Time spent in the full model's passes behind the prompt; None where it was not taken.
    """

    tokens: tuple[int, ...]
    full_passes: int
    drafted: int
    accepted: int
    draft_seconds: float
    step_seconds: float | None


@dataclass(frozen=True)
class Contender:
    """Somebody who decodes.

    Args:
        name: What it is called.
        decode: Continues a prompt by a number of tokens at most.
        draft_bytes: Memory that its draft takes beside the model.
        training_seconds: How long its draft was trained, if that is known.
        foreign: Whether the code is another's, which may refuse this model.
    """

    name: str
    decode: Callable[[Sequence[int], int], Decoded] = field(repr=False)
    draft_bytes: int = 0
    training_seconds: float | None = None
    foreign: bool = False


def own_way(model: LayerSkipModel, drafter: Drafter | None) -> Callable[[Sequence[int], int], Decoded]:
    """layerskip's decoding, with a drafter; None decodes plainly."""

    def decode(prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        generation = generate(model, prompt, drafter=drafter, max_new_tokens=max_new_tokens)
        stats = generation.stats
        return Decoded(
            tuple(generation.tokens),
            full_passes=stats.rounds + 1,
            drafted=stats.drafted,
            accepted=stats.accepted,
            draft_seconds=stats.draft_seconds,
            step_seconds=stats.verification_seconds,
        )

    return decode


def transformers_way(model: LayerSkipModel, **options: Any) -> Callable[[Sequence[int], int], Decoded]:
    """``generate`` of transformers.

    Args:
        model: The model.
        options: Of ``generate``, such as ``assistant_model`` or ``prompt_lookup_num_tokens``.
    """
    hf_model: Any = model.hf_model
    eos = sorted(model.eos_token_ids)
    # Greedy and nothing else, whatever the checkpoint recommends: that is what all are compared on.
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
            full_passes=tally.full_passes,
            drafted=tally.drafted,
            accepted=tally.accepted,
            draft_seconds=tally.clock.seconds("draft"),
            step_seconds=None,
        )

    return decode


@dataclass
class _Tally:
    """What transformers did, counted while it does it."""

    clock: PhaseClock
    full_passes: int = 0
    drafted: int = 0
    accepted: int = 0


@contextmanager
def _settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Let ``generate`` take its defaults from other settings than the model's."""
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
        tally.full_passes += config.num_hidden_layers == depth

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
        config.num_hidden_layers = depth  # where drafting failed halfway


@contextmanager
def _candidates_counted(model: Any, tally: _Tally) -> Iterator[None]:
    """Count and time what an assisted mode proposes, and count what of it stands."""
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
