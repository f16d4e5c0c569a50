"""Linear layers on weights of 8 or 4 bits, through PyTorch's own kernels for them.

Draft steps are a row wide, and there the kernels are as fast as the bytes of a weight can be read. Wide passes (traces,
prompts) are faster on weights that are dequantized for the pass: on an x86 CPU with AMX and 1024 rows, by a factor of
15 at 8 bits and of 3 at 4 bits. On a CPU without kernels for bfloat16 they are in float32, five times as fast there.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.drafting.rounding import GROUP, MIDDLE, rounded_to_int4, rounded_to_int8
from layerskip.packed_linear import has_kernels_for

# What the kernels compute in. Others take float32 too, but need seven times as long with it.
COMPUTE_DTYPE = torch.bfloat16
# Weights dequantized at a time: stays in a processor's cache, and is never a third copy of the whole.
_CHUNK = 2**20
# Rows of a weight are padded to whole blocks of the CPU kernel, in which they are all stored alike.
_CPU_BLOCK = 64
# What the CUDA kernel stores together, from the best to the least: so many times 16 columns. And its rows.
_CUDA_TILES = (8, 4, 2)
_CUDA_ROWS = 8


class QuantizedLinear(nn.Module):
    """A linear layer whose weight has few bits.

    Args:
        weight: ``[n, k]``, to round.
        bias: ``[n]``; None without one.
        dtype: Of the output, whatever the input's.

    Attributes:
        outputs: ``n``.
    """

    most_rows: ClassVar[int]  # that the kernel multiplies faster than dequantized weights do, measured as above
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        # The kernels read whole groups of a row, and would read after its end.
        self.outputs, self._padding = weight.shape[0], -weight.shape[1] % GROUP
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n]``, of ``[..., k]``."""
        rows = x.reshape(-1, x.shape[-1]).to(COMPUTE_DTYPE)
        if self._padding:
            rows = functional.pad(rows, (0, self._padding))
        few = len(rows) <= self.most_rows
        product = self._narrow(rows) if few else self._wide(rows.to(_wide_dtype(rows.device.type)))
        out = product.view(*x.shape[:-1], -1).to(self._dtype)
        return out if self.bias is None else out + self.bias

    def _narrow(self, rows: Tensor) -> Tensor:
        """The product with a few rows, ``[m, k]``, as ``[m, n]``."""
        raise NotImplementedError

    def _wide(self, rows: Tensor) -> Tensor:
        """The same with many rows."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales; a bias has none of its own."""
        return sum(buffer.nbytes for buffer in self.buffers() if buffer is not self.bias)

    @classmethod
    def bytes_of(cls, outputs: int, inputs: int) -> int:
        """Bytes of the weights and scales of a layer of this size."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """Weights of 8 bits with a scale a row."""

    most_rows = 16

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        numbers, scales = rounded_to_int8(_padded(weight, columns=self._padding))
        self.numbers = nn.Buffer(numbers, persistent=False)
        self.scales = nn.Buffer(scales, persistent=False)

    @classmethod
    def bytes_of(cls, outputs: int, inputs: int) -> int:
        return outputs * (inputs + -inputs % GROUP + COMPUTE_DTYPE.itemsize)

    def _narrow(self, rows: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(rows, self.numbers, self.scales)

    def _wide(self, rows: Tensor) -> Tensor:
        # Every whole number of 8 bits is one of bfloat16, so that nothing is rounded again.
        chunks = self.numbers.split(max(_CHUNK // rows.shape[-1], 1))
        return torch.cat([functional.linear(rows, chunk.to(rows.dtype)) for chunk in chunks], dim=1) * self.scales

    def dequantized(self) -> Tensor:
        """The weight that it multiplies by, ``[n, k]`` in float32."""
        weight = self.numbers.float() * self.scales[:, None].float()
        return weight[:, : weight.shape[1] - self._padding]


class Int4Linear(QuantizedLinear):
    """Weights of 4 bits with a scale and a zero point for each group of a row."""

    most_rows = 128

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        on_cuda = weight.is_cuda
        missing = -self.outputs % (_CUDA_ROWS if on_cuda else _CPU_BLOCK)
        numbers, scales, zeros = rounded_to_int4(_padded(weight, rows=missing, columns=self._padding))
        pack = _packed_for_cuda if on_cuda else _packed_for_cpu
        self.numbers = nn.Buffer(pack(numbers), persistent=False)
        both = torch.stack([scales.T, zeros.T], dim=-1).contiguous()  # [k / group, n, 2]
        self.scales_and_zeros = nn.Buffer(both, persistent=False)

    @classmethod
    def bytes_of(cls, outputs: int, inputs: int) -> int:
        groups = outputs * -(-inputs // GROUP)  # but for padded rows, of which large layers have none
        return groups * (GROUP // 2 + 2 * COMPUTE_DTYPE.itemsize)

    def _narrow(self, rows: Tensor) -> Tensor:
        multiply = torch._weight_int4pack_mm if rows.is_cuda else torch._weight_int4pack_mm_for_cpu
        product: Tensor = multiply(rows, self.numbers, GROUP, self.scales_and_zeros)
        return product if product.shape[1] == self.outputs else product[:, : self.outputs].contiguous()

    def _wide(self, rows: Tensor) -> Tensor:
        if rows.is_cuda:  # whose packed weights only its kernel can read
            return self._narrow(rows)
        blocks = max(_CHUNK // (rows.shape[-1] * _CPU_BLOCK), 1)
        chunks = range(0, self.outputs, blocks * _CPU_BLOCK)
        parts = [functional.linear(rows, self._padded(start, blocks).to(rows.dtype)) for start in chunks]
        return torch.cat(parts, dim=1)

    def dequantized(self) -> Tensor:
        """The weight that it multiplies by, ``[n, k]`` in float32."""
        weight = self._padded(0, -(-self.outputs // _CPU_BLOCK))
        return weight[:, : weight.shape[1] - self._padding]

    def _padded(self, start: int, blocks: int) -> Tensor:
        """The same of some blocks of rows, from a row on, with whole groups of columns."""
        rows = slice(start, start + blocks * _CPU_BLOCK)
        numbers = _unpacked(self.numbers[rows]).unflatten(1, (-1, GROUP))  # [n, k / group, group]
        scales, zeros = self.scales_and_zeros[:, rows].float().permute(2, 1, 0)[..., None]
        weight = torch.addcmul(zeros - MIDDLE * scales, numbers.float(), scales).flatten(1)
        return weight[: self.outputs - start]


@cache
def _wide_dtype(device_type: str) -> torch.dtype:
    """What products with dequantized weights are computed in."""
    return COMPUTE_DTYPE if device_type != "cpu" or has_kernels_for(COMPUTE_DTYPE) else torch.float32


def _padded(weight: Tensor, *, rows: int = 0, columns: int = 0) -> Tensor:
    """A weight with zeros after its last rows and columns; itself where there are none to add, which pad would copy."""
    return functional.pad(weight, (0, columns, 0, rows)) if rows or columns else weight


def _packed_for_cpu(numbers: Tensor) -> Tensor:
    """As the CPU kernel wants numbers of 4 bits, ``[n, k]``: two to a byte, ``[n, k / 2]``."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return packed


def _packed_for_cuda(numbers: Tensor) -> Tensor:
    """As the CUDA kernel wants them."""
    tiles = next(tiles for tiles in _CUDA_TILES if numbers.shape[1] % (16 * tiles) == 0)
    return torch._convert_weight_to_int4pack((numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8), tiles)


def _unpacked(packed: Tensor) -> Tensor:
    """The inverse of :func:`_packed_for_cpu`, for whole blocks of rows, in uint8.

    A block's columns are stored one after the other, two rows to a byte. Which rows share a byte depends on the
    processor's vectors.
    """
    rows, low_first = packed.shape[0], _rows_by_place()
    block = len(low_first)
    by_column = packed.view(rows // block, -1, block // 2)  # [blocks, k, bytes]
    both = torch.cat([by_column & 15, by_column >> 4], dim=-1)
    if not torch.equal(low_first, torch.arange(block, device="cpu")):
        both = both[..., low_first.argsort()]
    return both.transpose(1, 2).reshape(rows, -1)


@cache
def _rows_by_place() -> Tensor:
    """Which row of a block lies where in a column: first those in the lower halves of its bytes, then the others.

    Found by packing the rows' own numbers, 4 bits at a time.

    Raises:
        RuntimeError: Columns do not lie one after the other.
    """
    rows = torch.arange(_CPU_BLOCK, dtype=torch.int32, device="cpu")[:, None].expand(-1, 2).contiguous()
    digits = [_packed_for_cpu(rows >> 4 * digit & 15).flatten().long() for digit in range(2)]
    lower, upper = ((digits[0] >> half & 15) + ((digits[1] >> half & 15) << 4) for half in (0, 4))
    for half in (_CPU_BLOCK // 2, _CPU_BLOCK // 4):
        if torch.equal(lower[:half], lower[half : 2 * half]):  # the two columns are packed alike
            return torch.cat([lower[:half], upper[:half]])
    raise RuntimeError("weights of 4 bits are packed in a way that is not known here")
