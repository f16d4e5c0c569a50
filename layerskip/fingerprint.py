"""The identity of a model: sizes, and a fingerprint of its configuration and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip.model import LayerSkipModel
from layerskip.model_state import adapter_state, computing_settings
from layerskip.packed_linear import packed_weights
from layerskip.utils import digest

# Elements hashed at a time: keeps the scratch memory small and in the processor's cache.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a profile belongs to.

    Args:
        id: Its hub id, folder or alias. For people; not compared.
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
        id: Its name; None takes the name that it was loaded by.
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
    config, hf_model = model.config, model.hf_model
    settings = computing_settings(config)
    settings |= {name: state for name, module in hf_model.named_modules() if (state := adapter_state(module))}
    weights = {
        part_name: [list(part.shape), *_checksums(part)]
        for name, weight in _weights(hf_model)
        for part_name, part in _plain_parts(name, weight)
    }
    return digest([settings, weights])


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, each once, and the buffers that a model saves, such as the scales that bitsandbytes keeps."""
    yield from model.named_parameters()
    yield from packed_weights(model)
    tied_too = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in tied_too:
            yield name, tensor


def _plain_parts(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors in a weight, by name: itself, or the values, scales and the like of a quantized one."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    for part in weight.__tensor_flatten__()[0]:
        yield from _plain_parts(f"{name}.{part}", getattr(weight, part))


def _checksums(weight: Tensor) -> list[int]:
    """A plain and a position-weighted sum of a tensor's bits, modulo 2^64."""
    sums = []
    for chunk in torch.split(weight.detach().reshape(-1), _CHUNK):
        words = _words(chunk)
        # Odd multipliers, so that no single changed bit can vanish modulo 2^64.
        positions = torch.arange(1, 2 * len(words), 2, device=words.device)
        sums += [words.sum(), (words * positions).sum()]
    # Chunks are weighted by powers of 31, so that exchanging two of them is noticed.
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
