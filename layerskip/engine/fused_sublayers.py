"""Sublayers in fewer operators, over plain, packed or quantized linears; each is taken where a check finds it equal.

Between the linears of a layer transformers' modules run some 35 small operators: a third of a small model's pass on a
CPU, and most of the kernels of a pass on CUDA. The same arithmetic takes a dozen. Which modules do that arithmetic is
not read off their names: :class:`Probe` runs both on the same states, and what differs by more than rounding runs as
the model has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.engine.joint_linears import joint_of
from layerskip.model import LayerSkipModel
from layerskip.model_state import runs_as_its_class
from layerskip.sublayers import AttentionSublayer, MLPSublayer, PassContext, Sublayer

# Largest difference that counts as rounding, of the largest value.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Passes of a probe: over the start of a text, over several tokens after it, and over one.
_PROBE_WIDTHS = (3, 2, 1)


def equal_to_rounding(ours: Tensor, theirs: Tensor, computed_in: torch.dtype | None = None) -> bool:
    """Whether two outputs of one shape differ by rounding alone; ``computed_in`` may be a shorter type than theirs."""
    rounding = _ROUNDING.get(computed_in or theirs.dtype)
    if rounding is None:  # of a type whose rounding is not known, nothing counts as equal
        return False
    largest = rounding * theirs.abs().max()
    return ours.shape == theirs.shape and bool(((ours - theirs).abs().max() <= largest).item())


def all_equal_to_rounding(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], computed_in: torch.dtype | None = None
) -> bool:
    """Whether several outputs are; see :func:`equal_to_rounding`."""
    pairs = zip(ours, theirs, strict=True)
    return len(ours) == len(theirs) and all(equal_to_rounding(a, b, computed_in) for a, b in pairs)


class RMSNorm(nn.Module):
    """A root-mean-square norm in few operators, for CPUs.

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


class OneKernelRMSNorm(nn.Module):
    """The same as PyTorch's own, which is one kernel on CUDA.

    Args:
        weight: As in :class:`RMSNorm`.
        epsilon: Likewise.
    """

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight, persistent=False)
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self._epsilon)


@torch.inference_mode()
def fused_norm(norm: nn.Module) -> nn.Module:
    """The norm in few operators where it is a root-mean-square norm, by a check; the norm itself elsewhere."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not isinstance(epsilon, float) or type(weight) is not nn.Parameter or not runs_as_its_class(norm):
        return norm
    if weight.dtype not in _ROUNDING:
        return norm
    kind = RMSNorm if weight.device.type == "cpu" else OneKernelRMSNorm
    states = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    expected = norm(states)
    for factor in (weight.detach(), 1 + weight.detach()):  # Gemma's norms add 1
        fused = kind(factor, epsilon)
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


Slot = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class FusedAttention:
    """Attention in a dozen operators: query, key and value as one linear, and one rotation of queries and keys.

    Queries that share a key are rows of one attention where there is a mask, so that keys are never repeated.

    Args:
        sublayer: The sublayer; its queries, keys and values are plain, packed or quantized together.
        table: Shared by all sublayers of the layer type.

    Attributes:
        compiled: Takes the place of :meth:`run`, if anything does.

    Raises:
        AttributeError: The module lacks what such an attention has.
    """

    remembers: ClassVar = False

    def __init__(self, sublayer: AttentionSublayer, table: RotaryTable) -> None:
        attention: Any = sublayer.attention
        _check_weights(attention, "q_proj", "k_proj", "v_proj", "o_proj")
        self.num_weights, self._rotary, self._window = sublayer.num_weights, sublayer.rotary, sublayer.window
        self._before, self._after, self._table = sublayer.before, _if_any(sublayer.after), table
        self._joint, self._out = joint_of(attention, "q_proj", "k_proj", "v_proj"), joint_of(attention, "o_proj")
        self._layer, self._scaling = int(attention.layer_idx), float(attention.scaling)
        cap = getattr(attention, "attn_logit_softcapping", None)
        self._cap = None if cap is None else float(cap)
        dim = self._dim = int(attention.head_dim)
        self._heads = [size // dim for size in self._joint.sizes]
        self._shared_by = self._heads[0] // self._heads[1]  # queries of a key
        self._rotated = sum(self._joint.sizes[:2])

        self.compiled: Callable[..., Tensor] | None = None

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        cos, sin = self._table.of(context.rotary[self._rotary])
        mask = context.repeated_mask(self._window, self._shared_by)
        return (self.compiled or self.run)(x, cos, sin, mask, context.cache.slot(self._layer))

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slot: Slot) -> Tensor:
        """Compute it from tensors, and the layer's slot in the cache."""
        queries, keys, values = self._projected(x, cos, sin)
        keys, values = slot(keys, values)
        if mask is None and self._cap is None:
            seen = functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=x.shape[1] > 1, scale=self._scaling, enable_gqa=True
            )
            seen = seen.transpose(1, 2).reshape(1, x.shape[1], -1)
        else:
            seen = self._seen(queries, keys, values, mask)
        return self._out.plus(seen, x) if self._after is None else x + self._after(self._out(seen))

    def _projected(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of states ``[1, n, hidden_size]``, each ``[1, heads, n, dim]``."""
        n, dim = x.shape[1], self._dim
        joint = self._joint(self._before(x))  # [1, n, (queries + keys + values) * dim]
        halves = joint[..., : self._rotated].view(1, n, -1, 2, dim // 2)
        rotated = torch.addcmul(halves * cos, halves.flip(-2), sin).view(1, n, -1, dim).transpose(1, 2)
        values = joint[..., self._rotated :].view(1, n, -1, dim).transpose(1, 2)
        return rotated[:, : self._heads[0]], rotated[:, self._heads[0] :], values

    def _seen(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What queries ``[1, heads, n, dim]`` see under a mask whose rows are repeated, ``[1, n, heads * dim]``."""
        n, shared_by = queries.shape[2], self._shared_by
        packed = queries.unflatten(1, (-1, shared_by)).flatten(2, 3)  # [1, key heads, shared_by * n, dim]
        if self._cap is None:
            seen = functional.scaled_dot_product_attention(packed, keys, values, mask, scale=self._scaling)
        else:
            scores = torch.tanh(packed @ keys.transpose(2, 3) * (self._scaling / self._cap)) * self._cap
            scores = scores if mask is None else scores + mask
            seen = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
        by_head: Tensor = seen.unflatten(2, (shared_by, n))  # [1, key heads, shared_by, n, dim]
        return by_head.permute(0, 3, 1, 2, 4).reshape(1, n, -1)


class FusedMLP:
    """A gated MLP in seven operators: gate and up as one linear.

    Args:
        sublayer: The sublayer; its gate and up are plain, packed or quantized together.

    Attributes:
        compiled: Takes the place of :meth:`run`, if anything does.

    Raises:
        AttributeError: The module lacks what such an MLP has.
    """

    remembers: ClassVar = False

    def __init__(self, sublayer: MLPSublayer) -> None:
        mlp: Any = sublayer.mlp
        _check_weights(mlp, "gate_proj", "up_proj", "down_proj")
        self.num_weights, self._before, self._after = sublayer.num_weights, sublayer.before, _if_any(sublayer.after)
        self._joint, self._down = joint_of(mlp, "gate_proj", "up_proj"), joint_of(mlp, "down_proj")
        self._activation: Callable[[Tensor], Tensor] = mlp.act_fn
        self.compiled: Callable[..., Tensor] | None = None

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        return (self.compiled or self.run)(x)

    def run(self, x: Tensor) -> Tensor:
        """Compute it from states ``[1, n, hidden_size]`` alone."""
        gate, up = self._joint.parts(self._before(x))
        gated = self._activation(gate) * up
        return self._down.plus(gated, x) if self._after is None else x + self._after(self._down(gated))


def _check_weights(module: nn.Module, *known: str) -> None:
    """Make sure that no weights lie elsewhere than in the linear layers that are known, such as in norms of queries.

    Raises:
        AttributeError: Some do.
    """
    others = [name for name, _ in module.named_parameters() if name.partition(".")[0] not in known]
    if others:
        raise AttributeError(f"{others[0]}: of unknown use")


def _if_any(after: nn.Module) -> nn.Module | None:
    return None if type(after) is nn.Identity else after


def fused_candidate(sublayer: Sublayer, table: RotaryTable) -> FusedAttention | FusedMLP | None:
    """A sublayer in few operators, yet to be checked; None if it has not the parts, or more is attached to one."""
    if not all(map(runs_as_its_class, sublayer.module.modules())):
        return None
    try:
        return FusedAttention(sublayer, table) if isinstance(sublayer, AttentionSublayer) else FusedMLP(sublayer)
    except AttributeError:
        return None


class Probe:
    """Runs single sublayers on random states: the start of a text, several tokens after it, and one.

    Keys and values count as well: where attention is nearly even, its output hardly tells whether they are right.

    Args:
        model: The model whose sublayers they are.
    """

    def __init__(self, model: LayerSkipModel) -> None:
        self._model = model
        generator = torch.Generator().manual_seed(0)
        shape = (1, sum(_PROBE_WIDTHS), model.config.hidden_size)
        states = torch.randn(shape, generator=generator).to(model.device, model.dtype)
        self._states = states.split(_PROBE_WIDTHS, dim=1)

    @torch.inference_mode()
    def __call__(self, step: Callable[[Tensor, PassContext], Tensor]) -> tuple[Tensor, ...]:
        """What a step adds to the states, ``[1, n, hidden_size]``, and the keys and values that it leaves."""
        cache = self._model.new_cache(sum(_PROBE_WIDTHS))
        changes = []
        for states in self._states:
            context = self._model.pass_context(states.shape[1], cache)
            changes.append(step(states, context) - states)
            cache.advance(states.shape[1])
        return torch.cat(changes, dim=1), *cache.written()


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
        self, sublayer: Sublayer, expected: tuple[Tensor, ...], computed_in: torch.dtype
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
        if candidate is not None and all_equal_to_rounding(self.probe(candidate), expected, computed_in):
            return candidate
        return lighter


def _fused_norms(before: nn.Module) -> nn.Module:
    """A norm in few operators; of a copy at lower precision, with the cast that follows it."""
    if isinstance(before, nn.Sequential):
        return nn.Sequential(*map(fused_norm, before))
    return fused_norm(before)
