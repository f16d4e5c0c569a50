"""Compile the two kinds of sublayer, once for all layers and all skip sets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerskip.engine.fused_sublayers import FusedAttention, FusedMLP
from layerskip.model import LayerSkipModel
from layerskip.sublayers import AttentionSublayer, Sublayer, attend, feed_forward

# More than captured passes have: some 13 widths and a handful of buckets, of trees and of chains.
_SHAPES = 512


def compile_sublayers(model: LayerSkipModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a model's sublayers; the Hugging Face model stays as it is.

    Attention and MLP are compiled as one function each, which takes the modules of its layer as arguments, so that the
    number of compilations depends neither on the number of layers nor on the skip set, only on the shapes: a prompt,
    one token, several. They happen in the first passes and take seconds to minutes. Reading and writing the cache is
    left out of the compiled code, because its length changes with every pass.

    Sets ``allow_unspec_int_on_nn_module`` of ``torch._dynamo.config`` for the process, without which every layer would
    be compiled separately, because transformers' attention knows its layer's number; and raises its recompile limits.

    Args:
        model: The model. Make its engine afterwards, because passes cost something else now.
        backend: As in ``torch.compile``.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # Captured passes have fixed shapes: a compilation for each width and bucket. Beyond the limit, passes would run as
    # they are, without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 2 * _SHAPES
    )
    # Contexts grow with every pass: dynamic from the start, instead of first compiling for the length of the first.
    attention = torch.compile(_attend, backend=backend, dynamic=True)
    mlp = torch.compile(feed_forward, backend=backend, dynamic=True)
    for sublayer in model.sublayers:
        sublayer.function = attention if isinstance(sublayer, AttentionSublayer) else mlp
    model.compile_backend = backend


def compiled_in_fixed_shapes(
    step: FusedAttention | FusedMLP, backend: str | Callable[..., Any]
) -> FusedAttention | FusedMLP:
    """A fused sublayer that is compiled as a whole, its write to the cache included, for captured passes.

    Their shapes never change, so that there is one compilation of attention and one of the MLP for each width and
    bucket, whatever the number of layers.

    Args:
        step: The sublayer; stays as it is.
        backend: As in ``torch.compile``.
    """
    twin = copy.copy(step)
    twin.compiled = torch.compile(step.run, backend=backend, dynamic=False)
    return twin


def _attend(
    before: nn.Module,
    attention: nn.Module,
    after: nn.Module,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
) -> Tensor:
    return attend(before, attention, after, x, rotary, mask, _NotCompiled(cache))


def uncompiled(sublayer: Sublayer) -> Sublayer:
    """A sublayer as it was before :func:`compile_sublayers`."""
    plain = copy.copy(sublayer)
    plain.function = attend if isinstance(plain, AttentionSublayer) else feed_forward
    return plain


class _NotCompiled:
    """A cache whose update stays out of compiled code."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        updated: tuple[Tensor, Tensor] = self._cache.update(keys, values, layer)
        return updated
