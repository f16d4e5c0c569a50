"""Measure, in a fraction of a second, how fast this CPU runs packed weights and plain ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional

from layerskip.checkpoints import cache_folder
from layerskip.model import LayerSkipModel
from layerskip.packed_linear import PackedWeights, can_be_packed
from layerskip.utils import device_name, digest, library_versions, measured_once

# A plain step, and a verification.
_WIDTHS = (1, 4)
_REPEATS = 5
# Bytes of weights to measure: many times what a core's own cache holds, and copied in a moment.
_BYTES = 200_000_000

# A kernel is clearly faster than another by this factor.
_CLEARLY = 1.05


@dataclass(frozen=True)
class KernelSeconds:
    """Seconds of some linear layers, by the number of rows of their input.

    Args:
        plain: With plain weights.
        packed: With packed weights.
    """

    plain: Mapping[int, float]
    packed: Mapping[int, float]

    @property
    def packing_pays(self) -> bool:
        """Whether a plain step and a verification together take less time with packed weights."""
        return sum(self.packed.values()) < sum(self.plain.values())

    @property
    def one_row_is_faster_plain(self) -> bool:
        """Whether a single row, as in plain decoding, is clearly faster with plain weights."""
        return self.packed[1] > _CLEARLY * self.plain[1]


_SECONDS = TypeAdapter(KernelSeconds)


def load_kernel_seconds(model: LayerSkipModel, folder: Path | None = None) -> KernelSeconds | None:
    """What this CPU's kernels take for linear layers of a model; None if it has none that can be packed.

    Measured once for weights of such shapes and kept, so that all processes of a search run the same engine.

    Args:
        model: The model, on the CPU; it stays as it is.
        folder: Where the measurement is kept; None is :func:`layerskip.checkpoints.cache_folder`.
    """
    linears = list(_sample(model))
    if not linears:
        return None
    shapes = [list(linear.weight.shape) for linear in linears]
    where = [str(model.dtype), device_name(model.device), library_versions()]
    file = (folder or cache_folder()) / f"kernels-{digest([shapes, _WIDTHS, *where])}.json"
    return measured_once(file, _SECONDS, lambda: measure_kernels(linears), "kernels cost")


@torch.inference_mode()
def measure_kernels(linears: list[nn.Linear]) -> KernelSeconds:
    """Seconds of a plain step and a verification through some layers; best of some repeats.

    Args:
        linears: The layers, plain ones.
    """
    packed = [PackedWeights([linear]) for linear in linears]
    kernels: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "plain": [_plain(linear) for linear in linears],
        "packed": list(packed),
    }
    best: dict[str, dict[int, float]] = {name: {} for name in kernels}
    for width in _WIDTHS:
        inputs = [linear.weight.new_zeros(width, linear.in_features) for linear in linears]
        seconds: dict[str, list[float]] = {name: [] for name in kernels}
        for _ in range(_REPEATS):  # interleaved: a busy moment hits both
            for name, layers in kernels.items():
                started = time.perf_counter()
                for layer, x in zip(layers, inputs, strict=True):
                    layer(x)
                seconds[name].append(time.perf_counter() - started)
        for name, taken in seconds.items():
            best[name][width] = min(taken)
    return KernelSeconds(**best)


def _plain(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = linear.weight, linear.bias
    return lambda x: functional.linear(x, weight, bias)


def _sample(model: LayerSkipModel) -> Iterator[nn.Linear]:
    """Linear layers of the first sublayers, up to some bytes."""
    left = _BYTES
    for sublayer in model.sublayers:
        for child in sublayer.module.children():
            if left > 0 and can_be_packed(child):
                linear: Any = child
                left -= linear.weight.nbytes
                yield linear
