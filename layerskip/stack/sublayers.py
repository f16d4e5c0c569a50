"""A Hugging Face causal language model as a flat list of residual sublayers, ``x <- x + f(x)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerskip.stack.families import Family
from layerskip.stack.kv_cache import KVCache


@dataclass(frozen=True)
class PassContext:
    """What every sublayer of one forward pass shares.

    Args:
        rotary: Cosines and sines of the new positions, each ``[1, n, head_dim]``.
        masks: Attention mask by sliding window (None: no window).
        cache: Where keys and values are kept.
    """

    rotary: tuple[Tensor, Tensor]
    masks: Mapping[int | None, Tensor | None]
    cache: KVCache
    _elsewhere: dict[torch.device, PassContext] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> PassContext:
        """The same on another device, for models that lie on several; moved once a pass."""
        if device == self.rotary[0].device:
            return self
        if device not in self._elsewhere:
            cos, sin = (part.to(device) for part in self.rotary)
            masks = {window: None if mask is None else mask.to(device) for window, mask in self.masks.items()}
            self._elsewhere[device] = PassContext((cos, sin), masks, self.cache)
        return self._elsewhere[device]


def attend(
    before: nn.Module,
    attention: nn.Module,
    after: nn.Module,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
) -> Tensor:
    """``x + after(self_attn(before(x)))``; ``cache`` has the ``update`` that the attention module calls."""
    change, _ = attention(
        hidden_states=before(x), position_embeddings=rotary, attention_mask=mask, past_key_values=cache
    )
    out: Tensor = x + after(change)
    return out


def feed_forward(before: nn.Module, mlp: nn.Module, after: nn.Module, x: Tensor) -> Tensor:
    """``x + after(mlp(before(x)))``."""
    out: Tensor = x + after(mlp(before(x)))
    return out


class AttentionSublayer:
    """``x <- x + after(self_attn(before(x)))``, over the model's own modules.

    Attributes:
        function: What computes it: :func:`attend`, or the same made faster.
    """

    def __init__(self, before: nn.Module, attention: nn.Module, after: nn.Module) -> None:
        self.before, self.attention, self.after = before, attention, after
        self.device, self.num_weights = _device(attention), _num_weights(attention)
        self.window: int | None = getattr(attention, "sliding_window", None)
        self.function: Callable[..., Tensor] = attend

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        x, here = x.to(self.device), context.on(self.device)
        mask = here.masks[self.window]
        return self.function(self.before, self.attention, self.after, x, here.rotary, mask, here.cache)


class MLPSublayer:
    """``x <- x + after(mlp(before(x)))``, over the model's own modules.

    Attributes:
        function: What computes it: :func:`feed_forward`, or the same made faster.
    """

    def __init__(self, before: nn.Module, mlp: nn.Module, after: nn.Module) -> None:
        self.before, self.mlp, self.after = before, mlp, after
        self.device, self.num_weights = _device(mlp), _num_weights(mlp)
        self.function: Callable[..., Tensor] = feed_forward

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        return self.function(self.before, self.mlp, self.after, x.to(self.device))


Sublayer = AttentionSublayer | MLPSublayer


class LayerStandIn:
    """A decoder layer of a draft's own that runs instead of skipped sublayers.

    Its attention keeps keys and values of its own, which the full model's passes do not write: it has to see every
    position of the text itself.

    Args:
        attention: Its attention sublayer, which writes to a slot of the cache behind the model's layers.
        mlp: Its MLP sublayer.
    """

    def __init__(self, attention: AttentionSublayer, mlp: MLPSublayer) -> None:
        self.attention, self.mlp = attention, mlp

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        return self.mlp(self.attention(x, context), context)


def _device(module: nn.Module) -> torch.device:
    device: torch.device = next(module.parameters()).device
    return device


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sublayers_of(layers: nn.ModuleList, family: Family) -> tuple[Sublayer, ...]:
    """Flatten decoder layers into ``2 * len(layers)`` sublayers, attention and MLP in turn."""

    def norm(layer: nn.Module, name: str | None) -> nn.Module:
        return nn.Identity() if name is None else layer.get_submodule(name)

    stack: list[Sublayer] = []
    for layer in layers:
        stack.append(
            AttentionSublayer(
                norm(layer, family.before_attention),
                layer.get_submodule("self_attn"),
                norm(layer, family.after_attention),
            )
        )
        stack.append(
            MLPSublayer(
                norm(layer, family.before_mlp),
                layer.get_submodule("mlp"),
                norm(layer, family.after_mlp),
            )
        )
    return tuple(stack)
