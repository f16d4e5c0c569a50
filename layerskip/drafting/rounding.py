"""Rounding of weights to 8 and 4 bits, without any data: fast enough for every load of a model."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a row that share a scale and a zero point at 4 bits: the smallest group that the kernels know.
GROUP = 32
# The 4-bit number that stands for the zero point.
MIDDLE = 8
_LARGEST_INT8 = 127
_LARGEST_INT4 = 15
# How much of a group's range, to both sides of 0, the first numbers span. On Qwen2.5-Coder-1.5B (weights from a Q4_K_M
# file, 6 texts), the KL divergence of the draft from the target was 0.0132 with the whole range and no fit, 0.0098 with
# the whole range, 0.0082 with this one, and 0.0084 when fitted once more. Weights around 0 that have 4 bits already, as
# those of many GGUF files do, get their own numbers from 15/16 on.
_RANGE = 0.95
# Of a row or group of nothing but zeros.
_LEAST_SCALE = 1e-8
# Weights rounded at a time: what is computed on the way stays in a processor's cache.
_CHUNK = 2**17


@torch.no_grad()
def rounded_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to whole numbers from -127 to 127 times a scale.

    Args:
        weight: ``[n, k]``.

    Returns:
        The numbers, ``[n, k]`` in int8, and the scales, ``[n]`` in bfloat16.
    """
    parts = [_rows_in_int8(rows.float()) for rows in weight.split(_rows_at_a_time(weight))]
    numbers, scales = zip(*parts, strict=True)
    return torch.cat(numbers), torch.cat(scales)


def _rows_in_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = (rows.abs().amax(1) / _LARGEST_INT8).clamp(min=_LEAST_SCALE).to(torch.bfloat16)
    numbers = (rows / scales[:, None].float()).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
    return numbers.to(torch.int8), scales


@torch.no_grad()
def rounded_to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round each group of a row to whole numbers from 0 to 15: ``(number - 8) * scale + zero``.

    The numbers reach about from a group's least to its greatest weight at first. Then scale and zero point become those
    that give the weights with the least squared error for these numbers, and the weights are rounded again.

    Args:
        weight: ``[n, k]``, where ``k`` is a multiple of the group.

    Returns:
        The numbers, ``[n, k]`` in int32, and scales and zero points, each ``[n, k / group]`` in bfloat16.
    """
    parts = [_rows_in_int4(rows.float()) for rows in weight.split(_rows_at_a_time(weight))]
    numbers, scales, zeros = zip(*parts, strict=True)
    return torch.cat(numbers), torch.cat(scales), torch.cat(zeros)


def _rows_in_int4(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = rows.unflatten(1, (-1, GROUP))
    least, greatest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # faster than both by one operator
    scales = (_RANGE * (greatest - least) / _LARGEST_INT4).clamp(min=_LEAST_SCALE)
    zeros = _RANGE * least + MIDDLE * scales
    scales, zeros = _refitted(groups, _numbers(groups, scales, zeros) - MIDDLE, scales)
    scales, zeros = scales.to(torch.bfloat16), zeros.to(torch.bfloat16)
    numbers = _numbers(groups, scales.float(), zeros.float())
    return numbers.to(torch.int32).flatten(1), scales.squeeze(-1), zeros.squeeze(-1)


def _numbers(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest numbers from 0 to 15."""
    return torch.addcmul(MIDDLE - zeros / scales, groups, 1 / scales).round_().clamp_(0, _LARGEST_INT4)


def _refitted(groups: Tensor, numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares line through a group's weights over their numbers; where all numbers are one, the old scale."""
    weights, total = groups.sum(-1, keepdim=True), numbers.sum(-1, keepdim=True)
    squares, products = (torch.linalg.vecdot(numbers, other)[..., None] for other in (numbers, groups))
    spread = GROUP * squares - total.square()
    slopes = torch.where(spread > 0, (GROUP * products - total * weights) / spread, scales).clamp(min=_LEAST_SCALE)
    return slopes, (weights - slopes * total) / GROUP


def _rows_at_a_time(weight: Tensor) -> int:
    return max(_CHUNK // weight.shape[1], 1)
