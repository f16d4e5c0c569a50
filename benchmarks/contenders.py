"""Who decodes in the comparison: transformers in each of its modes, and layerskip."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip import LayerSkipModel, generate
from layerskip.decoding.drafting import Drafter
from layerskip.stack.skipset import SkipSet


@dataclass
class Run:
    """What one decoding of one prompt gave."""

    tokens: list[int]
    full_passes: int = 0
    draft_passes: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Contender:
    """A way to decode a prompt greedily."""

    name: str
    decode: Callable[[tuple[int, ...], int], Run] = field(repr=False)


def ours(name: str, model: LayerSkipModel, drafter: Drafter | None) -> Contender:
    """layerskip, plain or with a drafter."""

    def decode(prompt: tuple[int, ...], max_new_tokens: int) -> Run:
        generation = generate(model, prompt, drafter=drafter, max_new_tokens=max_new_tokens)
        stats = generation.stats
        # Each drafted token is one draft pass; each round verifies once; the prompt is one pass more.
        return Run(generation.tokens, stats.rounds + 1, stats.drafted, stats.drafted, stats.accepted)

    return Contender(name, decode)


def transformers_mode(name: str, model: PreTrainedModel, **options: Any) -> Contender:
    """``model.generate`` with some options."""
    draft_model = options.get("assistant_model")
    decode_with: Any = model.generate  # a tensor or a module, by its annotations

    def decode(prompt: tuple[int, ...], max_new_tokens: int) -> Run:
        ids = torch.tensor([prompt], device=model.device)
        run = Run([])
        with _passes_counted(model, draft_model, run), _candidates_counted(model, run):
            output = decode_with(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=0,
                **options,
            )
        run.tokens = output[0, len(prompt) :].tolist()
        return run

    return Contender(name, decode)


def assistant_of(model: PreTrainedModel, skip_set: SkipSet) -> PreTrainedModel:
    """A copy of the model that shares its weights, with skipped sublayers made to add nothing."""
    assistant = copy.deepcopy(model, memo={id(weight): weight for weight in model.parameters()})
    layers: Any = assistant.base_model.layers
    for layer in skip_set.attention:
        layers[layer].self_attn = _NoAttention()
    for layer in skip_set.mlp:
        layers[layer].mlp = _NoMLP()
    return assistant


class _NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _NoMLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@contextmanager
def _passes_counted(model: PreTrainedModel, draft_model: PreTrainedModel | None, run: Run) -> Iterator[None]:
    depth = model.config.num_hidden_layers

    def count(module: nn.Module, *_: Any) -> None:
        if module is draft_model or model.config.num_hidden_layers < depth:  # an early exit shortens the config
            run.draft_passes += 1
        else:
            run.full_passes += 1

    handles = [m.register_forward_pre_hook(count) for m in (model, draft_model) if m is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.config.num_hidden_layers = depth


@contextmanager
def _candidates_counted(model: Any, run: Run) -> Iterator[None]:
    """Count what an assisted mode proposes and what of it stands, through transformers' candidate generator."""
    original = model._get_candidate_generator

    def counted(*arguments: Any, **named: Any) -> Any:
        generator = original(*arguments, **named)
        propose, update = generator.get_candidates, generator.update_candidate_strategy

        def get_candidates(input_ids: Tensor, *rest: Any, **more: Any) -> Any:
            proposed = propose(input_ids, *rest, **more)
            run.drafted += proposed[0].shape[1] - input_ids.shape[1]
            return proposed

        def update_candidate_strategy(input_ids: Tensor, scores: Tensor, num_matches: int) -> Any:
            run.accepted += int(num_matches)
            return update(input_ids, scores, num_matches)

        generator.get_candidates, generator.update_candidate_strategy = get_candidates, update_candidate_strategy
        return generator

    model._get_candidate_generator = counted
    try:
        yield
    finally:
        del model._get_candidate_generator
