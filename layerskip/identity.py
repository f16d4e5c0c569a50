"""What makes two models the same model: a fingerprint of configuration and weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from layerskip.stack.model import LayerSkipModel

# Settings that change what a model computes. Named one by one, because a newer transformers adds new settings with
# harmless defaults to every configuration.
_COMPUTING_SETTINGS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)

# Elements hashed at a time: keeps the scratch memory small and in the processor's cache.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a profile is for.

    Args:
        id: Where it came from: a hub id, a folder or an alias. For people; not compared.
        family: Model family, such as ``llama``.
        num_layers: Number of decoder layers.
        hidden_size: Width of the hidden states.
        intermediate_size: Width of the MLPs.
        num_attention_heads: Query heads.
        num_key_value_heads: Key-value heads.
        vocab_size: Number of token ids.
        fingerprint: Hexadecimal hash of configuration and weights, see :func:`fingerprint`.
    """

    id: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    fingerprint: str
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how DraftProfile reads it from JSON

    def differences(self, other: ModelIdentity) -> dict[str, tuple[object, object]]:
        """The fields in which two identities differ, ``id`` apart: name to (own value, other's value)."""
        own, others = asdict(self), asdict(other)
        return {name: (own[name], others[name]) for name in own if name != "id" and own[name] != others[name]}


def identify(model: LayerSkipModel, id: str | None = None) -> ModelIdentity:
    """The identity of a loaded model.

    Args:
        model: The model.
        id: What to call it; None takes the name that it was loaded by.
    """
    config = model.config
    return ModelIdentity(
        id=id or config.name_or_path or "unnamed",
        family=model.family.name,
        num_layers=model.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        fingerprint=fingerprint(model),
    )


@torch.inference_mode()
def fingerprint(model: LayerSkipModel) -> str:
    """Hash a model's configuration and all its weights.

    Weights are hashed as bfloat16 where they are floating-point numbers, so that a checkpoint has one fingerprint
    whether it is loaded as float32 or as bfloat16. They are summed up on their own device with integer arithmetic, so
    that the result is the same everywhere and a large model on a GPU takes milliseconds.

    Returns:
        16 hexadecimal digits.
    """
    settings = {name: getattr(model.config, name, None) for name in _COMPUTING_SETTINGS}
    weights = {name: [list(weight.shape), *_checksums(weight)] for name, weight in model.hf_model.named_parameters()}
    text = json.dumps([settings, weights], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checksums(weight: Tensor) -> list[int]:
    """A plain and a position-weighted sum of a tensor's bits, modulo 2^64."""
    sums = []
    for chunk in torch.split(weight.detach().reshape(-1), _CHUNK):
        words = _words(chunk)
        # Odd multipliers, so that no single changed bit can vanish modulo 2^64.
        positions = torch.arange(1, 2 * len(words), 2, device=words.device)
        sums += [words.sum(), (words * positions).sum()]
    # Chunks are weighted by powers of 31, so that exchanging two of them shows.
    plain = weighted = 0
    for value, by_position in torch.stack(sums).view(-1, 2).tolist():
        plain = (plain * 31 + value) % 2**64
        weighted = (weighted * 31 + by_position) % 2**64
    return [plain, weighted]


def _words(chunk: Tensor) -> Tensor:
    """The bits of some weights as 64-bit integers, filled up with zeros."""
    if chunk.is_floating_point():
        chunk = chunk.to(torch.bfloat16)
    bits = chunk.contiguous().view(torch.uint8)
    return nn.functional.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
