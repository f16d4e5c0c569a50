"""A tiny random Llama of which it is known what it does not need, and a machine on which leaving that out pays.

What a sublayer adds to the hidden states is scaled down by a planted strength, drawn by the seed: some sublayers add
next to nothing, some a little, some as much as what was there before. If asked for, one MLP is undone by the next: both
can go, and neither can go alone, which no ranking of single sublayers shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip import LayerSkipModel, SkipSet
from layerskip.costs import CostModel, Costs, PassCosts, StepCosts
from search.prompts import EncodedPrompt, PromptSplit

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS = 256, 64, 128, 4, 2
_CONTEXT = 256
# Share of the sublayers, and between which strengths they add to the hidden states; the rest add in full.
_REDUNDANT, _REDUNDANT_STRENGTHS = 4 / 12, (0.002, 0.02)
_MEDIUM, _MEDIUM_STRENGTHS = 5 / 12, (0.03, 0.5)
# Enough that one alone does harm, and little enough that the second nearly undoes the first.
_UNDONE_STRENGTH = 0.5
# Queries and keys so large that attention looks at few positions; a mean over many would add little.
_SHARPNESS = 2.0
# Deviation of the logits: the likeliest token has a probability of about one half.
_LOGITS = 4.0

# In units of one plain decoding step.
_FIXED, _WIDER, _PREFILL = 0.03, 0.01, 1.0


@dataclass(frozen=True)
class Planted:
    """How much the sublayers of a model add to the hidden states.

    Args:
        strengths: One per sublayer, in stack order; 1 adds in full.
        undone: Layer whose MLP the next layer's MLP undoes, the attention between them being redundant; None for none.
    """

    strengths: tuple[float, ...]
    undone: int | None = None

    @classmethod
    def drawn(cls, num_layers: int, seed: int, *, undone: bool = False) -> Planted:
        """Strengths at random positions."""
        source, count = random.Random(seed), 2 * num_layers
        redundant, medium = round(_REDUNDANT * count), round(_MEDIUM * count)
        strengths = [_between(source, *_REDUNDANT_STRENGTHS) for _ in range(redundant)]
        strengths += [_between(source, *_MEDIUM_STRENGTHS) for _ in range(medium)]
        strengths += [1.0] * (count - redundant - medium)
        source.shuffle(strengths)
        if not undone:
            return cls(tuple(strengths))
        layer = source.randrange(num_layers - 1)
        between = _between(source, *_REDUNDANT_STRENGTHS)
        strengths[2 * layer + 1 : 2 * layer + 4] = [_UNDONE_STRENGTH, between, _UNDONE_STRENGTH]
        return cls(tuple(strengths), layer)

    @property
    def redundant(self) -> frozenset[int]:
        """Sublayers, by their index in the stack, of which nobody would notice that they are missing."""
        weak = {i for i, strength in enumerate(self.strengths) if strength <= _REDUNDANT_STRENGTHS[1]}
        return frozenset(weak if self.undone is None else weak | {2 * self.undone + 1, 2 * self.undone + 3})

    @property
    def needed(self) -> frozenset[int]:
        """Sublayers that add in full."""
        return frozenset(i for i, strength in enumerate(self.strengths) if strength == 1)

    def shows_in(self, skip_set: SkipSet) -> bool:
        """Whether a draft leaves out all that is redundant and nothing that is needed."""
        skipped = {index for index, skip in enumerate(skip_set.mask) if skip}
        return self.redundant <= skipped and not self.needed & skipped


def _between(source: random.Random, low: float, high: float) -> float:
    """A random number, evenly spread by its logarithm."""
    return float(low * (high / low) ** source.random())


@torch.no_grad()
def redundant_model(planted: Planted, seed: int) -> LayerSkipModel:
    """A random Llama with these strengths."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=len(planted.strengths) // 2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=_CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # keeps the size of what it is given
            module.weight.normal_(0, module.in_features**-0.5, generator=generator)
    model.model.embed_tokens.weight.normal_(0, 1, generator=generator)
    model.lm_head.weight.mul_(_LOGITS)
    for layer, strengths in zip(model.model.layers, _pairs(planted.strengths), strict=True):
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.mul_(_SHARPNESS)
        layer.self_attn.o_proj.weight.mul_(strengths[0])
        layer.mlp.down_proj.weight.mul_(strengths[1])
    if planted.undone is not None:
        mlp, undoing = (model.model.layers[planted.undone + i].mlp for i in range(2))
        undoing.load_state_dict(mlp.state_dict())
        undoing.down_proj.weight.neg_()
    return LayerSkipModel(model)


def _pairs(strengths: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(strengths[::2], strengths[1::2], strict=True))


def flat_costs(num_layers: int, most_drafted: int) -> CostModel:
    """A machine bound by memory: parts cost their share of the weights, and verifying a token more next to nothing."""
    attention = 2 * HIDDEN * HIDDEN * (1 + KEY_VALUE_HEADS / HEADS)
    mlp, head = 3 * HIDDEN * INTERMEDIATE, HIDDEN * VOCABULARY
    weight = (1 - _FIXED) / (num_layers * (attention + mlp) + head)
    widths = range(1, most_drafted + 2)
    step = StepCosts(_FIXED, attention * weight, mlp * weight, bridge=0.0, head={0: head * weight})
    passes = PassCosts(
        {width: 1 - head * weight + _WIDER * (width - 1) for width in widths}, dict.fromkeys(widths, head * weight)
    )
    costs = Costs(_CONTEXT, step, passes, _PREFILL)
    return CostModel(costs, costs)


def random_texts(seed: int, *, search: int, held_out: int = 1, length: int = 12) -> PromptSplit:
    """Random prompts."""
    source = random.Random(seed)
    made = [
        EncodedPrompt(f"{seed}-{number}", tuple(source.choices(range(VOCABULARY), k=length)))
        for number in range(search + held_out)
    ]
    return PromptSplit(tuple(made[:search]), tuple(made[search:]))
