"""Linear layers whose weights are packed once for the CPU's kernels (oneDNN).

``torch.nn.functional.linear`` packs a weight anew at every call with more than one row. A weight that is packed once is
read at the memory's speed for one row as for eight, so that verifying several tokens costs little more than one.
The packed weight is as large as the plain one, and opaque: it is unpacked on demand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DTYPES = (torch.float32, torch.bfloat16)
# Linears of one module that take the same input, by their names in transformers' modules: run as one.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# The number of rows that the layout is chosen for: as fast as any for 1 to 16 rows, and faster for more.
_ROWS = 32


def packing_available() -> bool:
    """Whether this build of PyTorch has oneDNN's packed linears."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def has_kernels_for(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for a type on this processor.

    An x86 processor without AVX-512 and without AVX-NE-CONVERT has none for bfloat16.
    """
    if not packing_available():
        return False
    return dtype == torch.float32 or (dtype in DTYPES and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def can_be_packed(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer on the CPU, in a type that has kernels.

    Quantized layers, layers with an adapter and layers with hooks are something else.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and has_kernels_for(module.weight.dtype)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


class PackedWeights:
    """The packed weights of one linear layer, or of several that take the same input, as one.

    Args:
        linears: The layers, each of shape ``[out_features, in_features]``, with equal ``in_features``.
        plain_one_row: Whether a single row runs on the plain weights, which are then kept as well; some CPUs are faster
            with them.

    Attributes:
        packed: ``[sum of out_features, in_features]``, opaque.
        bias: ``[sum of out_features]``; None if no layer has one.
        sizes: Each layer's ``out_features``.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, plain_one_row: bool = False) -> None:
        weights = [linear.weight.detach() for linear in linears]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        with torch.inference_mode(False):
            self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(whole.contiguous(), _ROWS)
        self.bias = joined_bias(linears)
        self.sizes = [linear.out_features for linear in linears]
        self._plain = [(linear.weight.detach(), linear.bias) for linear in linears] if plain_one_row else []
        self._latest: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """All layers' outputs, ``[..., sum of out_features]``, of inputs ``[..., in_features]``."""
        if self._plain and x.numel() == x.shape[-1]:
            parts = [functional.linear(x, weight, bias) for weight, bias in self._plain]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        return out

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """Each layer's outputs."""
        parts: Sequence[Tensor] = self(x).split(self.sizes, dim=-1)
        return parts

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual`` plus the outputs, of the same shape, in one operator on packed weights."""
        if self._plain and x.numel() == x.shape[-1]:
            return residual + self(x)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        return out

    def part(self, x: Tensor, index: int) -> Tensor:
        """One layer's outputs. A module calls its layers in turn with one input: all are computed for the first."""
        latest = self._latest
        if index == 0 or latest is None or latest[0] is not x:
            latest = (x, self(x).split(self.sizes, dim=-1))
        self._latest = latest if index + 1 < len(self.sizes) else None
        return latest[1][index]

    def dense(self, index: int) -> Tensor:
        """One layer's weight, unpacked: a new tensor."""
        whole: Tensor = self.packed.to_dense()
        weight: Tensor = whole.split(self.sizes)[index]
        return weight.clone()


def joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    """The biases of several layers as one, ``[sum of out_features]``; None if no layer has one."""
    if all(linear.bias is None for linear in linears):
        return None
    none = linears[0].weight
    return torch.cat([none.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears])


class PackedLinear(nn.Linear):
    """A linear layer, packed. A deep copy of it is a plain ``nn.Linear``, as is what it writes into a state dict.

    Args:
        linear: The layer.
        weights: Its packed weights, and those of its siblings.
        index: Which of them are its own.
    """

    def __init__(self, linear: nn.Linear, weights: PackedWeights, index: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a plain weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weights, self._index = weights, index
        self.bias = linear.bias
        self._trainable = linear.weight.requires_grad
        # Of the weight's shape, without its memory: whoever looks for a module's device, type and size finds them.
        outline = linear.weight.new_zeros(()).expand(linear.weight.shape)
        self.outline = nn.Buffer(outline, persistent=False)
        self.eval()

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The weight, ``[out_features, in_features]``, unpacked: a new tensor at every access."""
        return nn.Parameter(self.weights.dense(self._index), self._trainable)

    def forward(self, x: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if differentiable or x.dtype != self.outline.dtype:  # the packed kernel has no derivative, and casts nothing
            return functional.linear(x, self.weight.detach(), self.bias)
        return self.weights.part(x, self._index)

    def plain(self) -> nn.Linear:
        """The same layer with an unpacked weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        linear = self.plain()
        linear.bias = copy.deepcopy(self.bias, memo)
        return linear

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # of the variables themselves, a packed weight is none
            destination[f"{prefix}weight"] = self.weight.detach()


def packed_alone(linear: nn.Linear, *, plain_one_row: bool = False) -> PackedLinear:
    """One linear layer, packed; ``plain_one_row`` as in :class:`PackedWeights`."""
    return PackedLinear(linear, PackedWeights([linear], plain_one_row=plain_one_row), 0)


def pack_children(module: nn.Module, *, plain_one_row: bool = False) -> None:
    """Put packed layers in place of a module's linear ones; siblings with one input are packed as one.

    Only its direct children: what other modules do with their layers, such as an adapter's, is theirs.

    Args:
        module: The module.
        plain_one_row: As in :class:`PackedWeights`.
    """
    for names in _groups(module):
        linears: list[Any] = [module.get_submodule(name) for name in names]
        weights = PackedWeights(linears, plain_one_row=plain_one_row)
        for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
            setattr(module, name, PackedLinear(linear, weights, index))


def unpack(module: nn.Module) -> None:
    """Put plain layers back in place of all packed ones in a module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, PackedLinear):
                setattr(parent, name, child.plain())


def packed_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a module's packed layers by name, each unpacked when its turn comes."""
    for name, child in module.named_modules():
        if isinstance(child, PackedLinear):
            yield f"{name}.weight", child.weight


def _groups(module: nn.Module) -> list[tuple[str, ...]]:
    """Names of the children to pack, siblings together."""
    linears: dict[str, Any] = {name: child for name, child in module.named_children() if can_be_packed(child)}
    joint = [names for names in SIBLINGS if _are_siblings([linears.get(name) for name in names])]
    taken = set(chain.from_iterable(joint))
    return [*joint, *((name,) for name in linears if name not in taken)]


def _are_siblings(linears: Sequence[nn.Linear | None]) -> bool:
    kinds = {None if x is None else (x.in_features, x.weight.dtype) for x in linears}
    return len(kinds) == 1 and None not in kinds
