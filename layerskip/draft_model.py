"""A draft as a model of its own: the same architecture with the kept layers only.

A layer that is skipped whole goes. A layer of which one sublayer is kept stays, and the output projection of the other
becomes zero, so that ``x + f(x)`` is ``x``: a norm after the projection makes zero of zero. A trained layer takes its
place among them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from layerskip.drafting.draft_layer import DraftLayer
from layerskip.errors import ExportError
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet

# What the last projection of an attention module or an MLP is called.
_OUTPUT_PROJECTIONS = ("o_proj", "down_proj", "c_proj", "out_proj", "dense", "fc2")
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Lists in a configuration that may happen to be as long as the model is deep.
_NOT_PER_LAYER = ("architectures", "token_id", "token_ids", "tokens", "_factor")


def kept_layers(skip_set: SkipSet) -> tuple[int, ...]:
    """The layers of which a draft keeps at least one sublayer, ascending."""
    skipped = zip(skip_set.skips_attention, skip_set.skips_mlp, strict=True)
    return tuple(layer for layer, both in enumerate(skipped) if not all(both))


def config_of(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of a configuration for some of its layers.

    Lists with one entry a layer (``layer_types``, ``no_rope_layers`` and whatever else a family has) keep the entries
    of these layers.

    Args:
        config: The target model's.
        layers: For each of the copy's layers the one that it is, or is built like.
    """
    depth = config.num_hidden_layers
    kept = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == depth and not name.endswith(_NOT_PER_LAYER):
            setattr(kept, name, [value[layer] for layer in layers])
    kept.num_hidden_layers = len(layers)
    # Of GGUF files and the like, which are dequantized by now; the weights themselves are looked at below.
    if hasattr(kept, "quantization_config"):
        del kept.quantization_config
    return kept


@dataclass(frozen=True)
class _Layer:
    """A layer of a draft.

    Args:
        place: Index of the first sublayer that it runs or replaces.
        like: The model's layer that it is, or is built like.
        trained: The draft layer where it is one.
    """

    place: int
    like: int
    trained: DraftLayer | None = None


def _layers_of(skip_set: SkipSet, trained: Iterable[DraftLayer]) -> list[_Layer]:
    """In the order in which they run. No trained layer lies between the sublayers of one that is kept."""
    kept = [_Layer(2 * layer + skip_set.skips_attention[layer], layer) for layer in kept_layers(skip_set)]
    own = [_Layer(layer.start, layer.like, layer) for layer in trained]
    return sorted([*kept, *own], key=lambda layer: layer.place)


@torch.no_grad()
def draft_model_of(model: LayerSkipModel, skip_set: SkipSet, trained: Iterable[DraftLayer] = ()) -> PreTrainedModel:
    """The draft as a model of transformers' own class, in evaluation mode. It shares its weights.

    Args:
        model: The target model.
        skip_set: The sublayers that the draft leaves out.
        trained: Layers that run in place of some of them, by the index of the first; in the model's dtype, and where
            it is.

    Raises:
        ExportError: The weights are not plain numbers (quantized, adapted, offloaded), or a skipped sublayer has no
            output projection that is known.
    """
    full, layers = model.hf_model, _layers_of(skip_set, trained)
    prefix, likes = _prefix_of_layers(full), [layer.like for layer in layers]
    weights = _renumbered(full.state_dict(), prefix, likes)
    for number, layer in enumerate(layers):
        if layer.trained is not None:
            weights |= {f"{prefix}{number}.{name}": weight for name, weight in layer.trained.layer.state_dict().items()}
            continue
        for module, skipped in (("self_attn", skip_set.skips_attention), ("mlp", skip_set.skips_mlp)):
            if skipped[layer.like]:
                _zero_output(weights, full, f"{prefix}{layer.like}.{module}", f"{prefix}{number}.{module}")
    with torch.device("meta"):
        draft = type(full)(config_of(full.config, likes))
    _check_plain(weights, draft)
    draft.load_state_dict(weights, assign=True)
    draft.tie_weights()
    for name, buffer in _renumbered(dict(full.named_buffers()), prefix, likes).items():
        if name not in weights:  # rotary frequencies and the like, which no checkpoint holds
            owner, _, own = name.rpartition(".")
            draft.get_submodule(owner).register_buffer(own, buffer, persistent=False)
    draft.generation_config = _generation_config_of(full)
    draft.eval()
    return draft


def _generation_config_of(full: PreTrainedModel) -> GenerationConfig:
    """The special tokens alone: how to sample is the target model's to say, maybe in a way that cannot be saved."""
    original = full.generation_config or GenerationConfig()
    return GenerationConfig(**{name: getattr(original, name) for name in _SPECIAL_TOKENS})


def _prefix_of_layers(full: PreTrainedModel) -> str:
    base: Any = full.base_model
    [name] = [name for name, module in full.named_modules() if module is base.layers]
    return f"{name}."


def _renumbered(tensors: Mapping[str, Tensor], prefix: str, likes: Sequence[int]) -> dict[str, Tensor]:
    """The tensors outside of the layers, and for each layer of the draft those of the one that it is like."""
    renumbered = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    for number, like in enumerate(likes):
        start = f"{prefix}{like}."
        renumbered |= {
            f"{prefix}{number}.{name.removeprefix(start)}": tensor
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
    return renumbered


def _zero_output(weights: dict[str, Tensor], full: PreTrainedModel, old: str, new: str) -> None:
    """Make a sublayer's output projection zero; ``old`` is its name in the target model, ``new`` that in the draft."""
    projection = _output_projection(full.get_submodule(old), old)
    for name in [name for name in weights if name.startswith(f"{new}.{projection}.")]:
        weights[name] = torch.zeros_like(weights[name])


def _output_projection(sublayer: nn.Module, name: str) -> str:
    children = dict(sublayer.named_children())
    for projection in _OUTPUT_PROJECTIONS:
        if projection in children:
            return projection
    raise ExportError(
        f"{name}: half of this layer is skipped, and it has no output projection that is known "
        f"({', '.join(_OUTPUT_PROJECTIONS)}), so it cannot be made to do nothing"
    )


def _check_plain(weights: dict[str, Tensor], draft: PreTrainedModel) -> None:
    expected = draft.state_dict()
    different = sorted(weights.keys() ^ expected.keys())
    different += [name for name, weight in weights.items() if not _is_plain(weight, expected.get(name))]
    if different:
        raise ExportError(
            f"{different[0]}: not a plain weight of {type(draft).__name__}; load the model unquantized, on one device, "
            "with adapters merged"
        )


def _is_plain(weight: Tensor, expected: Tensor | None) -> bool:
    return (
        type(weight) is Tensor
        and weight.is_floating_point()
        and not weight.is_meta
        and expected is not None
        and weight.shape == expected.shape
    )
