"""Linear layers that take the same input, as one: queries with keys and values, and an MLP's gate with its up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.drafting.quantization import JointLinear, JointPart
from layerskip.drafting.quantized_linear import QuantizedLinear
from layerskip.model_state import runs_as_its_class
from layerskip.packed_linear import SIBLINGS, PackedLinear, joined_bias


class Joint(Protocol):
    """Linear layers that take the same input, as one.

    Attributes:
        sizes: Each layer's number of outputs.
    """

    sizes: list[int]

    def __call__(self, x: Tensor) -> Tensor:
        """All layers' outputs, ``[..., sum of sizes]``, of inputs ``[..., in_features]``."""

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """Each layer's outputs, ``[..., size]``."""

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual`` plus the outputs, of the same shape."""


class QuantizedJoint:
    """Quantized linear layers as one.

    Args:
        linear: All of them.
        sizes: As in :class:`Joint`.
    """

    def __init__(self, linear: QuantizedLinear, sizes: list[int]) -> None:
        self._multiply, self.sizes = linear.forward, sizes

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = self(x).split(self.sizes, dim=-1)
        return parts

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self._multiply(x)


class PlainJoint:
    """Plain linear layers, in one product where their weights lie one after the other; see :func:`join_weights`.

    Args:
        linears: The layers.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        weights = [linear.weight.detach() for linear in linears]
        whole = _as_one(weights)
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        self._products = list(zip(weights, biases, strict=True)) if whole is None else [(whole, joined_bias(linears))]

    def __call__(self, x: Tensor) -> Tensor:
        products = self._multiplied(x)
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        products = self._multiplied(x)
        return products if len(products) == len(self.sizes) else products[0].split(self.sizes, dim=-1)

    def _multiplied(self, x: Tensor) -> list[Tensor]:
        return [functional.linear(x, weight, bias) for weight, bias in self._products]

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


def join_weights(module: nn.Module) -> None:
    """Lay the weights of a module's linear layers that take the same input one after the other in memory.

    Each stays the parameter that it was, with the same values; afterwards they are parts of one tensor.
    """
    for names in SIBLINGS:
        linears: list[Any] = [getattr(module, name, None) for name in names]
        if not all(map(_is_plain, linears)) or len({(x.in_features, x.weight.dtype) for x in linears}) > 1:
            continue
        weights = [linear.weight for linear in linears]
        if _as_one([weight.detach() for weight in weights]) is None:
            # Parameters that can be trained stay so; those that were made in inference mode are changed in it alone.
            with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
                parts = torch.cat(weights).split([len(weight) for weight in weights])
                for weight, part in zip(weights, parts, strict=True):
                    weight.data = part


def _as_one(weights: Sequence[Tensor]) -> Tensor | None:
    """Weights ``[n, k]`` that lie one after the other, as one ``[sum of n, k]`` over the same memory."""
    first = weights[0]
    if len(weights) == 1:
        return first
    end = first.data_ptr()
    for weight in weights:
        together = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (together and weight.is_contiguous() and weight.data_ptr() == end):
            return None
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _is_plain(linear: object) -> bool:
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and runs_as_its_class(linear)


def joint_of(module: nn.Module, *names: str) -> Joint:
    """Some of a module's linear layers, as one.

    Raises:
        AttributeError: It has not all of them, or they are something else than plain, packed or quantized together.
    """
    layers: list[Any] = [getattr(module, name) for name in names]
    if all(map(_is_plain, layers)):
        return PlainJoint(layers)
    shared = [_shared_by(layer) for layer in layers]
    if any(other is not shared[0] for other in shared):
        raise AttributeError(f"{', '.join(names)}: not together")
    joint = shared[0]
    return QuantizedJoint(joint.linear, joint.sizes) if isinstance(joint, JointLinear) else joint


def _shared_by(layer: nn.Module) -> Any:
    """What computes a layer's outputs, with its siblings'."""
    if isinstance(layer, JointPart):
        return layer.joint
    if isinstance(layer, PackedLinear):
        return layer.weights
    if isinstance(layer, QuantizedLinear):
        return QuantizedJoint(layer, [layer.outputs])
    raise AttributeError(f"{type(layer).__name__}: neither plain, packed nor quantized")
