"""Sublayers in fewer operators, over packed or quantized linears; each is taken where a check finds it equal.

Between the linears of a layer transformers' modules run some 35 small operators, a third of a small model's pass on a
CPU. The same arithmetic takes a dozen. Which modules do that arithmetic is not read off their names:
:class:`Probe` runs both on the same states, and what differs by more than rounding runs as the model has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.drafting.quantization import JointLinear, JointPart
from layerskip.drafting.quantized_linear import QuantizedLinear
from layerskip.model import LayerSkipModel
from layerskip.packed_linear import PackedLinear
from layerskip.sublayers import AttentionSublayer, MLPSublayer, PassContext, Sublayer

# Largest difference that counts as rounding, of the largest value.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Passes of a probe: over the start of a text, over several tokens after it, and over one.
_PROBE_WIDTHS = (3, 2, 1)


def equal_to_rounding(ours: Tensor, theirs: Tensor, computed_in: torch.dtype | None = None) -> bool:
    """Whether two outputs of one shape differ by rounding alone; ``computed_in`` may be a shorter type than theirs."""
    largest = _ROUNDING[computed_in or theirs.dtype] * theirs.abs().max()
    return ours.shape == theirs.shape and bool(((ours - theirs).abs().max() <= largest).item())


class RMSNorm(nn.Module):
    """A root-mean-square norm in few operators.

    Args:
        weight: ``[hidden_size]``, by which the normalized states are multiplied.
        epsilon: Added to the mean square.
    """

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight, persistent=False)
        self._epsilon = torch.tensor(epsilon, dtype=torch.float32)
        self._share = 1 / len(weight)

    def forward(self, x: Tensor) -> Tensor:
        # torch.nn.functional.rms_norm is a composite on CPUs, of more operators than these.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length, value=self._share).rsqrt_()
        return (x * scale).to(x.dtype) * self.weight


@torch.inference_mode()
def fused_norm(norm: nn.Module) -> nn.Module:
    """The norm in few operators where it is a root-mean-square norm, by a check; the norm itself elsewhere."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not isinstance(epsilon, float) or type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return norm
    states = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    expected = norm(states)
    for factor in (weight.detach(), 1 + weight.detach()):  # Gemma's norms add 1
        fused = RMSNorm(factor, epsilon)
        if equal_to_rounding(fused(states), expected):
            return fused
    return norm


class RotaryTable:
    """Cosines and sines of a pass in the shape in which heads are rotated, made once a pass.

    A pass hands all sublayers of one layer type the same tensors, by which its table is known.
    """

    def __init__(self) -> None:
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """For cosines and sines ``[1, n, dim]``, the factors of both halves of each head, ``[1, n, 1, 2, dim / 2]``."""
        latest = self._latest
        if latest is None or latest[0] is not rotary[0]:
            halves = (*rotary[0].shape[:2], 1, 2, -1)
            cos, sin = rotary[0].view(halves), rotary[1].view(halves)
            latest = self._latest = (rotary[0], cos, torch.cat([-sin[..., :1, :], sin[..., 1:, :]], dim=-2))
        return latest[1], latest[2]


class Joint(Protocol):
    """Linear layers that take the same input, as one.

    Attributes:
        sizes: Each layer's number of outputs.
    """

    sizes: list[int]

    def __call__(self, x: Tensor) -> Tensor:
        """All layers' outputs, ``[..., sum of sizes]``, of inputs ``[..., in_features]``."""

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

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self._multiply(x)


class FusedAttention:
    """Attention in a dozen operators: query, key and value as one linear, and one rotation of queries and keys.

    Args:
        sublayer: The sublayer, its linears packed or quantized, queries, keys and values together.
        table: Shared by all sublayers of the layer type.

    Raises:
        AttributeError: The module lacks what such an attention has.
    """

    remembers: ClassVar = False

    def __init__(self, sublayer: AttentionSublayer, table: RotaryTable) -> None:
        attention: Any = sublayer.attention
        self.num_weights, self._rotary, self._window = sublayer.num_weights, sublayer.rotary, sublayer.window
        self._before, self._table = sublayer.before, table
        self._joint, self._out = _joint(attention, "q_proj", "k_proj", "v_proj"), _weights(attention.o_proj)
        self._layer, self._scaling = int(attention.layer_idx), float(attention.scaling)
        dim = self._dim = int(attention.head_dim)
        self._heads = [size // dim for size in self._joint.sizes]
        self._rotated = sum(self._joint.sizes[:2])

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        n, dim = x.shape[1], self._dim
        joint = self._joint(self._before(x))  # [1, n, (queries + keys + values) * dim]
        cos, sin = self._table.of(context.rotary[self._rotary])
        halves = joint[..., : self._rotated].view(1, n, -1, 2, dim // 2)
        rotated = torch.addcmul(halves * cos, halves.flip(-2), sin).view(1, n, -1, dim).transpose(1, 2)
        values = joint[..., self._rotated :].view(1, n, -1, dim).transpose(1, 2)
        queries, keys = rotated[:, : self._heads[0]], rotated[:, self._heads[0] :]
        keys, values = context.cache.update(keys, values, self._layer)
        mask = context.masks[self._window]
        seen = functional.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None and n > 1, scale=self._scaling, enable_gqa=True
        )
        return self._out.plus(seen.transpose(1, 2).reshape(1, n, -1), x)


class FusedMLP:
    """A gated MLP in seven operators: gate and up as one linear.

    Args:
        sublayer: The sublayer, its linears packed or quantized, gate and up together.

    Raises:
        AttributeError: The module lacks what such an MLP has.
    """

    remembers: ClassVar = False

    def __init__(self, sublayer: MLPSublayer) -> None:
        mlp: Any = sublayer.mlp
        self.num_weights, self._before = sublayer.num_weights, sublayer.before
        self._joint, self._down = _joint(mlp, "gate_proj", "up_proj"), _weights(mlp.down_proj)
        self._size = self._joint.sizes[0]
        self._activation: Callable[[Tensor], Tensor] = mlp.act_fn

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        joint = self._joint(self._before(x))
        gated = self._activation(joint[..., : self._size]) * joint[..., self._size :]
        return self._down.plus(gated, x)


def fused_candidate(sublayer: Sublayer, table: RotaryTable) -> FusedAttention | FusedMLP | None:
    """A sublayer of such linears in few operators, yet to be checked; None if it has not the parts."""
    if type(sublayer.after) is not nn.Identity:
        return None
    try:
        return FusedAttention(sublayer, table) if isinstance(sublayer, AttentionSublayer) else FusedMLP(sublayer)
    except AttributeError:
        return None


def _weights(linear: nn.Module) -> Joint:
    if isinstance(linear, PackedLinear):
        return linear.weights
    if isinstance(linear, QuantizedLinear):
        return QuantizedJoint(linear, [linear.outputs])
    raise AttributeError("neither packed nor quantized")


def _joint(module: Any, *names: str) -> Joint:
    layers = [getattr(module, name) for name in names]
    shared = [layer.joint if isinstance(layer, JointPart) else _weights(layer) for layer in layers]
    if any(other is not shared[0] for other in shared):
        raise AttributeError("not together")
    joint = shared[0]
    return QuantizedJoint(joint.linear, joint.sizes) if isinstance(joint, JointLinear) else joint


class Probe:
    """Runs single sublayers on random states: the start of a text, several tokens after it, and one.

    Args:
        model: The model whose sublayers they are.
    """

    def __init__(self, model: LayerSkipModel) -> None:
        self._model = model
        generator = torch.Generator().manual_seed(0)
        shape = (1, sum(_PROBE_WIDTHS), model.config.hidden_size)
        self._states = torch.randn(shape, generator=generator).to(model.dtype).split(_PROBE_WIDTHS, dim=1)

    @torch.inference_mode()
    def __call__(self, step: Callable[[Tensor, PassContext], Tensor]) -> Tensor:
        """What a step adds to the states, ``[1, n, hidden_size]``."""
        cache = self._model.new_cache(sum(_PROBE_WIDTHS))
        changes = []
        for states in self._states:
            context = self._model.pass_context(states.shape[1], cache)
            changes.append(step(states, context) - states)
            cache.advance(states.shape[1])
        return torch.cat(changes, dim=1)


class Fusing:
    """Finds sublayers of one model in fewer operators.

    Args:
        model: The model.

    Attributes:
        probe: Runs its sublayers on random states.
    """

    def __init__(self, model: LayerSkipModel) -> None:
        self.probe = Probe(model)
        self._tables: dict[str | None, RotaryTable] = {}

    def fused(
        self, sublayer: Sublayer, expected: Tensor, computed_in: torch.dtype
    ) -> FusedAttention | FusedMLP | Sublayer:
        """A sublayer in few operators where that gives what is expected; itself, with faster norms, elsewhere.

        Args:
            sublayer: The sublayer, its linears packed or quantized.
            expected: What the probe gives for the module's own arithmetic.
            computed_in: The shortest type that it computes in.
        """
        lighter = copy.copy(sublayer)
        lighter.before, lighter.after = _fused_norms(sublayer.before), fused_norm(sublayer.after)
        table = self._tables.setdefault(getattr(sublayer, "rotary", None), RotaryTable())
        candidate = fused_candidate(lighter, table)
        if candidate is not None and equal_to_rounding(self.probe(candidate), expected, computed_in):
            return candidate
        return lighter


def _fused_norms(before: nn.Module) -> nn.Module:
    """A norm in few operators; of a copy at lower precision, with the cast that follows it."""
    if isinstance(before, nn.Sequential):
        return nn.Sequential(*map(fused_norm, before))
    return fused_norm(before)
