"""Measure, in a second or two, how fast this CPU runs packed weights and plain ones."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.checkpoints import cache_folder
from layerskip.engine.cost_measurement import comparable_seconds
from layerskip.model import LayerSkipModel
from layerskip.packed_linear import PackedWeights, can_be_packed, has_kernels_for
from layerskip.utils import device_name, digest, library_versions, measured_once

# A plain step, and a verification of usual width.
_ONE, _SEVERAL = 1, 5
_REPEATS = 7
# Bytes of weights to measure: more than caches hold, which servers have of hundreds of megabytes.
_BYTES = 600_000_000

# A kernel is clearly faster than another by this factor.
_CLEARLY = 1.05
# Over packed layers sublayers run in fewer operators, which saved 12 % of a pass of SmolLM2: so much slower may the
# layers themselves be.
_FEWER_OPERATORS = 1.1
# One row may take so much longer than several with the same kernel; if it takes more, the machine was busy.
_MOST = 1.5
_ATTEMPTS = 3


@dataclass(frozen=True)
class KernelSeconds:
    """Seconds of some linear layers, by the number of rows of their input.

    Args:
        plain: With plain weights.
        packed: With packed weights.
        weights: How many weights they have.
    """

    plain: Mapping[int, float]
    packed: Mapping[int, float]
    weights: int

    @property
    def packing_pays(self) -> bool:
        """Whether a plain step and a verification together take less time with packed weights, or hardly more.

        For a single row the plain weights may be kept as well. What runs between the linear layers is in favour.
        """
        one_row = min(self.plain[_ONE], self.packed[_ONE])
        return one_row + self.packed[_SEVERAL] < _FEWER_OPERATORS * sum(self.plain.values())

    @property
    def one_row_is_faster_plain(self) -> bool:
        """Whether a single row, as in plain decoding, is clearly faster with plain weights."""
        return self.packed[_ONE] > _CLEARLY * self.plain[_ONE]

    @property
    def is_plausible(self) -> bool:
        """Whether no kernel took clearly longer for one row than for several, as it may on a busy machine."""
        return all(seconds[_ONE] <= _MOST * seconds[_SEVERAL] for seconds in (self.plain, self.packed))

    @property
    def for_one_weight(self) -> float:
        """Seconds that a single row takes for each weight, with the faster kernel."""
        return min(self.packed[_ONE], self.plain[_ONE]) / self.weights


def load_kernel_seconds(
    model: LayerSkipModel, folder: Path | None = None, *, dtype: torch.dtype | None = None
) -> KernelSeconds | None:
    """What this CPU's kernels take for linear layers of a model; None if it has none that can be packed.

    Measured once for weights of such shapes and kept, so that all processes of a search run the same engine; on a busy
    machine that is measured again by the next one.

    Args:
        model: The model, on the CPU; it stays as it is.
        folder: Where the measurement is kept; None is :func:`layerskip.checkpoints.cache_folder`.
        dtype: The type of the layers that are measured; None is the model's own.
    """
    dtype = dtype or model.dtype
    linears = list(_sample(model, dtype))
    if not linears:
        return None
    shapes = [list(linear.weight.shape) for linear in linears]
    where = [str(dtype), device_name(model.device), library_versions()]
    file = (folder or cache_folder()) / f"kernels-{digest([shapes, _ONE, _SEVERAL, *where])}.json"

    def measure() -> KernelSeconds:
        converted = [_converted(linear, dtype) for linear in linears]
        for _ in range(_ATTEMPTS):
            seconds = measure_kernels(converted)
            if seconds.is_plausible:
                break
        return seconds

    return measured_once(file, KernelSeconds, measure, "kernels cost", keep=lambda seconds: seconds.is_plausible)


def seconds_saved_by_bfloat16(model: LayerSkipModel, folder: Path | None = None) -> float | None:
    """Seconds that a plain step would save if the model was in bfloat16, negative if it would take longer.

    Linear layers are measured in both types, as in :func:`load_kernel_seconds`, and taken for all of the model.

    Args:
        model: The model, on the CPU, before its weights are packed.
        folder: As there.

    Returns:
        None if the model is not in float32, if nothing of it can be packed, or this CPU has no bfloat16 kernels.
    """
    if model.dtype != torch.float32 or not has_kernels_for(torch.bfloat16):
        return None
    own, shorter = (load_kernel_seconds(model, folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    if own is None or shorter is None:
        return None
    head = model.vocab_size * int(model.config.hidden_size)
    weights = sum(sublayer.num_weights for sublayer in model.sublayers) + head
    return (own.for_one_weight - shorter.for_one_weight) * weights


def _converted(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    return linear if linear.weight.dtype == dtype else copy.deepcopy(linear).to(dtype)


@torch.inference_mode()
def measure_kernels(linears: list[nn.Linear]) -> KernelSeconds:
    """Seconds of a plain step and a verification through some layers, of interleaved repeats.

    Args:
        linears: The layers, plain ones.
    """
    kernels: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "plain": [_plain(linear) for linear in linears],
        "packed": [PackedWeights([linear]) for linear in linears],
    }
    inputs = {
        width: [linear.weight.new_zeros(width, linear.in_features) for linear in linears] for width in (_ONE, _SEVERAL)
    }
    runs = list(product(kernels, inputs))
    rounds = [[_seconds(kernels[name], inputs[width]) for name, width in runs] for _ in range(1 + _REPEATS)]
    seconds = dict(zip(runs, comparable_seconds(rounds[1:]), strict=True))  # the first chooses kernels
    plain, packed = ({width: seconds[name, width] for width in inputs} for name in kernels)
    return KernelSeconds(plain, packed, weights=sum(linear.weight.numel() for linear in linears))


def _seconds(layers: Iterable[Callable[[Tensor], Tensor]], inputs: Iterable[Tensor]) -> float:
    started = time.perf_counter()
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    return time.perf_counter() - started


def _plain(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = linear.weight, linear.bias
    return lambda x: functional.linear(x, weight, bias)


def _sample(model: LayerSkipModel, dtype: torch.dtype) -> Iterator[nn.Linear]:
    """Linear layers of the first sublayers, up to some bytes in a type."""
    left = _BYTES
    for sublayer in model.sublayers:
        for child in sublayer.module.children():
            if left > 0 and can_be_packed(child):
                linear: Any = child
                left -= linear.weight.numel() * dtype.itemsize
                yield linear
