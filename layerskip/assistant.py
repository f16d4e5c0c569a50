"""A draft as a model of its own, for ``generate(assistant_model=...)`` of transformers; it shares the model's weights.

transformers reads positions and mask sizes off layer 0's cache entry, and counts cache entries by layer. So the draft's
layers are cut anew: each begins with an attention that is kept and goes on to the next one, and every layer has a cache
entry that is used.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip.draft_model import config_of
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError, UnsupportedModelError
from layerskip.kv_cache import CACHE_NAMES
from layerskip.model import LayerSkipModel
from layerskip.shared_copies import shared_copy
from layerskip.sublayers import AttentionSublayer, PassContext, Stack, Step

Module = TypeVar("Module", bound=nn.Module)


def assistant_of(model: LayerSkipModel, config: DraftConfig, weights: DraftWeights) -> PreTrainedModel:
    """A causal language model that computes a draft, over the model's own weights.

    Args:
        model: The model.
        config: How to draft. Of the policy, only the stopping rule is used: it sets how many tokens ``generate`` lets
            the draft propose at once, and above which confidence.
        weights: Its bridges and draft layers are used. Its draft vocabulary is not: ``generate`` needs scores for every
            token.

    Raises:
        InvalidInputError: The draft has no attention, or the skip set or a trained layer is for another model.
        UnsupportedModelError: A part of the model runs something else than its class does, such as accelerate's hooks,
            which a copy of the part would not.
    """
    original: Any = model.hf_model
    stack = model.stack_of(config.skip_set, stand_ins=weights.placed_on(model).steps, precision=config.precision)
    steps = _single_steps(stack)
    kinds = [layer for layer, step in steps if isinstance(step, AttentionSublayer)]
    if not kinds:
        raise InvalidInputError(
            "as_assistant: the profile leaves out every attention, and generate counts positions by a draft's "
            "attention; use layerskip.speculate(profile)"
        )
    assistant, decoder = _twin(original), _twin(original.base_model)
    setattr(assistant, original.base_model_prefix, decoder)
    decoder.layers = nn.ModuleList(_Layer(steps, number) for number, steps in enumerate(_cut(steps)))
    if stack.head is not None:
        assistant.set_output_embeddings(stack.head)
    assistant.config = decoder.config = config_of(original.config, kinds)
    assistant.generation_config = copy.deepcopy(original.generation_config)
    state = config.stopping.new_state()
    assistant.generation_config.num_assistant_tokens = state.max_length
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = state.threshold
    twin: PreTrainedModel = assistant
    return twin


def _twin(module: Module) -> Module:
    """A module of the same class over the same parts, whose parts can be exchanged without a change to the original."""
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"as_assistant: {type(module).__name__} has a forward of its own (accelerate's hooks on several devices, "
            "or a patch), which a copy of it would not run; use layerskip.speculate(profile)"
        )
    return shared_copy(module)


def _single_steps(stack: Stack) -> list[tuple[int, Step]]:
    """The draft's steps, trained layers as two, each with the model's layer that it is of, or is like."""
    steps: list[tuple[int, Step]] = []
    for index, step in stack.steps:
        if isinstance(step, DraftLayer):
            steps += [(step.like, part) for part in (step.attention, step.mlp)]
        else:
            steps.append((index // 2, step))
    return steps


def _cut(steps: list[tuple[int, Step]]) -> list[list[Step]]:
    """The draft's steps by layer: each has one attention, and what comes before the first belongs to the first."""
    layers: list[list[Step]] = [[]]
    for _, step in steps:
        if isinstance(step, AttentionSublayer) and any(isinstance(other, AttentionSublayer) for other in layers[-1]):
            layers.append([])
        layers[-1].append(step)
    return layers


class _Layer(nn.Module):
    """Some of a draft's steps, called as transformers calls a decoder layer.

    Args:
        steps: The steps; one of them is an attention.
        number: The layer's place, by which its attention finds its cache entry.
    """

    def __init__(self, steps: list[Step], number: int) -> None:
        super().__init__()
        self._steps = [_renumbered(step, number) if isinstance(step, AttentionSublayer) else step for step in steps]
        [attention] = [step for step in self._steps if isinstance(step, AttentionSublayer)]
        self._window, self._rotary = attention.window, attention.rotary
        # Found by parameters(), and by whatever else goes through a model's modules.
        self.parts = nn.ModuleList(
            part for step in self._steps for part in (step, *vars(step).values()) if isinstance(part, nn.Module)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **others: Any,
    ) -> Tensor:
        """Hidden states ``[b, n, hidden_size]`` after the layer, of those before it."""
        cache: Any = next((others[name] for name in CACHE_NAMES if name in others), None)
        context = PassContext({self._rotary: position_embeddings}, {self._window: attention_mask}, cache)
        for step in self._steps:
            hidden_states = step(hidden_states, context)
        return hidden_states


def _renumbered(sublayer: AttentionSublayer, number: int) -> AttentionSublayer:
    twin = copy.copy(sublayer)
    twin.attention = _twin(sublayer.attention)
    twin.attention.layer_idx = number  # type: ignore[assignment]
    return twin
