"""Random models of real shapes, of which it is known what they do not need: redundancy is planted.

Random weights would accept no draft: every sublayer adds as much to the hidden states as they hold. Here half of the
sublayers are weak, by a strength that is found such that a draft without them is accepted as often as asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig

from layerskip.attention_masks import needed_attention
from layerskip.model import LayerSkipModel
from layerskip.names import Precision
from layerskip.skip_set import SkipSet

# Tokens that compete for the next place; the logits of others are made small, so that gaps between the best are wide.
_COMPETING, _HEAD, _QUIET = 256, 4.0, 0.1
# Queries and keys so large that attention looks at few positions; a mean over many would add little.
_SHARPNESS = 2.0
# Between which the strength of weak sublayers is sought, and how often it is halved, by its logarithm.
_STRENGTHS, _HALVINGS = (1e-3, 1.0), 8
# How much more medium sublayers add than weak ones.
_MEDIUM = 5.0

# What all shapes of a family share.
_LLAMA = partial(LlamaConfig, max_position_embeddings=16384, tie_word_embeddings=False, eos_token_id=None)
_GEMMA_2 = partial(Gemma2Config, max_position_embeddings=16384, eos_token_id=None)
_TINY = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}

SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-3-8b": partial(
        _LLAMA,
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "gemma-2-9b": partial(
        _GEMMA_2,
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
    "tiny": partial(_LLAMA, **_TINY),
    "tiny-gemma-2": partial(_GEMMA_2, head_dim=32, **_TINY),
}


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> LayerSkipModel:
    """A model with transformers' own random weights, made on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **needed_attention(config))
    return LayerSkipModel(model.eval())


@torch.no_grad()
def sharp_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LayerSkipModel:
    """A model whose random weights keep the size of what they are given, and whose next tokens are rather sure."""
    model = random_model(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    hf_model: Any = model.hf_model
    for module in hf_model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5, generator=generator)
    hf_model.get_input_embeddings().weight.normal_(0, 1, generator=generator)
    head = hf_model.get_output_embeddings().weight
    head.mul_(_HEAD)
    head[_COMPETING:].mul_(_QUIET)
    for layer in hf_model.base_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.mul_(_SHARPNESS)
    return model


@dataclass(frozen=True)
class Redundancy:
    """Which sublayers of a model are made to add little.

    Args:
        weak: Their indices: half of all, of both kinds, spread over the middle of the stack.
        medium: Others, a quarter, that add five times as much.
    """

    weak: tuple[int, ...]
    medium: tuple[int, ...]

    @classmethod
    def of(cls, num_sublayers: int) -> Redundancy:
        """For a model with so many sublayers, the first and last of which are needed."""
        inner = range(1, num_sublayers - 1)
        weak = tuple(index for index in inner if index % 4 in (1, 2))
        medium = tuple(index for index in inner if index % 8 in (3, 4))
        return cls(weak, medium)

    def skip_set(self, num_layers: int, medium: int = 0) -> SkipSet:
        """The skip set of the weak sublayers and of some medium ones."""
        skipped = {*self.weak, *self.medium[:medium]}
        return SkipSet.from_mask([index in skipped for index in range(2 * num_layers)])


@torch.inference_mode()
def agreement(
    model: LayerSkipModel, skip_set: SkipSet, tokens: Tensor, precision: Precision = "full", *, start: int = 16
) -> float:
    """How often a draft's choice is the target model's, teacher-forced over a text, ``[n]``, from a position on."""
    choices = []
    for stack in (model.target_stack, model.stack_of(skip_set, precision=precision)):
        cache = model.new_cache(len(tokens))
        x = stack.run(model.embed(tokens), model.pass_context(len(tokens), cache))
        choices.append(model.logits(x, None if stack is model.target_stack else stack).argmax(-1))
    return float((choices[0] == choices[1])[start:].float().mean())


class Plant:
    """Scales what weak and medium sublayers add, and finds the strength at which a draft is accepted as often as asked.

    Args:
        model: The model; the output projections of these sublayers are changed.
        redundancy: Which they are.
    """

    def __init__(self, model: LayerSkipModel, redundancy: Redundancy) -> None:
        self._model, self._redundancy = model, redundancy
        # Scaling in place again and again would round away what weights hold.
        self._originals = {index: self._projection(index).detach().clone() for index in self._scaled}

    @property
    def _scaled(self) -> Sequence[int]:
        return (*self._redundancy.weak, *self._redundancy.medium)

    def _projection(self, index: int) -> Tensor:
        decoder: Any = self._model.hf_model.base_model
        layer = decoder.layers[index // 2]
        weight: Tensor = layer.mlp.down_proj.weight if index % 2 else layer.self_attn.o_proj.weight
        return weight

    @torch.no_grad()
    def strengthen(self, strength: float) -> None:
        """Let weak sublayers add so much of what they would, and medium ones more."""
        for index in self._scaled:
            factor = strength if index in self._redundancy.weak else min(_MEDIUM * strength, 1.0)
            self._projection(index).copy_(self._originals[index] * factor)

    def find(self, acceptance: float, skip_set: SkipSet, tokens: Tensor) -> float:
        """Set the strength at which a draft that skips these sublayers agrees so often; return it."""
        low, high = _STRENGTHS
        strength = high
        for _ in range(_HALVINGS):
            strength = math.sqrt(low * high)
            self.strengthen(strength)
            low, high = (strength, high) if agreement(self._model, skip_set, tokens) > acceptance else (low, strength)
        self.strengthen(strength)
        return strength
