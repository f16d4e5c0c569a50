"""Copies of a model's sublayers and head at lower precision, which cost a draft fewer bytes to read.

A copy has the target's own modules, with quantized linear layers in place of plain ones: norms, rotary embeddings,
attention and its keys and values are those of the target. Copies are made when they are first needed, from the model's
weights alone, and never written to disk.

Draft models that are the target's own weights with fewer bits: ML-SpecQD (arXiv 2503.13565), QSpec (arXiv 2410.11305).
Their activations stay in 16 bits here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from layerskip.drafting.quantized_linear import COMPUTE_DTYPE, Int4Linear, Int8Linear, QuantizedLinear
from layerskip.errors import InvalidInputError
from layerskip.names import PRECISIONS, Precision
from layerskip.packed_linear import SIBLINGS, PackedLinear, joined_bias
from layerskip.shared_copies import is_patched, shared_copy
from layerskip.sublayers import AttentionSublayer, MLPSublayer, Sublayer

_SUBLAYERS: Mapping[Precision, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
# With 4 bits, the head loses most of the acceptance, and it is a small part of what is read: on SmolLM2, acceptance was
# 0.90 with a head of 4 bits and 0.98 with one of 8, on a step that is a few percent longer.
_HEADS: Mapping[Precision, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int8Linear}
# Rows and columns of a weight to try the kernels on, and how far off a product of it may be.
_PROBE, _PROBE_ERROR = 64, 0.1
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedCopies:
    """The copies of one model's sublayers and head. They keep what the model's weights were when they were made.

    Args:
        sublayers: The model's.
        head_shape: Its output head's numbers of tokens and of inputs.
        dtype: Its floating-point type.
    """

    def __init__(self, sublayers: Sequence[Sublayer], head_shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._originals, self._head_shape, self._dtype = sublayers, head_shape, dtype
        self._sublayers: dict[tuple[Precision, int], Sublayer] = {}
        self._heads: dict[type[QuantizedLinear], QuantizedLinear] = {}
        self._problems: dict[Precision, str | None] = {"full": None}

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions at which this model can draft here, ``full`` first."""
        return tuple(precision for precision in PRECISIONS if self._problem(precision) is None)

    def check(self, precision: Precision) -> None:
        """Make sure that the model can draft at a precision here.

        Raises:
            InvalidInputError: Its weights are not plain numbers (quantized already, offloaded), a module of it is
                patched, or its device has no kernel for it. The message says which.
        """
        problem = self._problem(precision)
        if problem is not None:
            raise InvalidInputError(f"precision {precision}: {problem}")

    def sublayers(self, precision: Precision, indices: Sequence[int]) -> dict[int, Sublayer]:
        """Copies of some sublayers, by index; none at full precision. Made now where they are not there yet.

        Raises:
            InvalidInputError: As in :meth:`check`.
        """
        if precision == "full":
            return {}
        self.check(precision)
        for index in indices:
            if (precision, index) not in self._sublayers:
                original = self._originals[index]
                self._sublayers[precision, index] = _copy_of(original, _SUBLAYERS[precision], self._dtype)
        return {index: self._sublayers[precision, index] for index in indices}

    def head(self, precision: Precision, weight: Callable[[], Tensor]) -> QuantizedLinear:
        """A copy of the whole head.

        Args:
            precision: Not ``full``.
            weight: Gives the head's weight, ``[vocab_size, hidden_size]``, where no copy is there yet.

        Raises:
            InvalidInputError: As in :meth:`check`.
        """
        self.check(precision)
        kind = _HEADS[precision]
        if kind not in self._heads:
            self._heads[kind] = self.head_of(precision, weight())
        return self._heads[kind]

    def head_of(self, precision: Precision, rows: Tensor) -> QuantizedLinear:
        """A copy of some of the head's rows, ``[n, hidden_size]``, which is not kept here.

        Raises:
            InvalidInputError: As in :meth:`check`.
        """
        self.check(precision)
        return _HEADS[precision](rows, None, self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies that were made so far."""
        linears = {id(linear): linear for copied in self._sublayers.values() for linear in _quantized_in(copied)}
        return sum(linear.nbytes for linear in [*linears.values(), *self._heads.values()])

    def bytes_needed(self, precision: Precision, indices: Sequence[int] | None = None) -> int:
        """Bytes that the copies of some sublayers and of the head take, made or not; 0 at full precision.

        Args:
            precision: The precision.
            indices: Of the sublayers; None counts all of them.

        Raises:
            InvalidInputError: As in :meth:`check`.
        """
        if precision == "full":
            return 0
        self.check(precision)
        kept = range(len(self._originals)) if indices is None else indices
        plain = chain.from_iterable(_plain_linears(_module_of(self._originals[index])) for index in kept)
        sublayers = sum(_SUBLAYERS[precision].bytes_of(linear.out_features, linear.in_features) for linear in plain)
        return sublayers + _HEADS[precision].bytes_of(*self._head_shape)

    def _problem(self, precision: Precision) -> str | None:
        """What prevents a precision, and what to do, in one line; None if nothing does."""
        if precision not in self._problems:
            self._problems[precision] = self._find_problem(precision)
        return self._problems[precision]

    def _find_problem(self, precision: Precision) -> str | None:
        modules = [_module_of(sublayer) for sublayer in self._originals]
        weights = chain.from_iterable(_what_is_not_plain(module) for module in modules)
        unfit = next(weights, None)
        if unfit is not None:
            return f"{unfit}; draft at full precision, or load the model unquantized and in memory"
        for device in sorted({str(sublayer.device) for sublayer in self._originals}):
            if not all(_runs_on(torch.device(device), kinds[precision]) for kinds in (_SUBLAYERS, _HEADS)):
                return f"PyTorch {torch.__version__} has no kernel for it on {device}; draft at full precision"
        return None


def _module_of(sublayer: Sublayer) -> nn.Module:
    return sublayer.attention if isinstance(sublayer, AttentionSublayer) else sublayer.mlp


def _copy_of(sublayer: Sublayer, kind: type[QuantizedLinear], dtype: torch.dtype) -> Sublayer:
    """A sublayer over the same modules but for its linear layers.

    Its input is brought to the kernels' type once, and an MLP computes in it. Attention gives keys and values in the
    model's own type, because they go to the cache that it shares with the target model.
    """
    before = sublayer.before if dtype == COMPUTE_DTYPE else nn.Sequential(sublayer.before, _Cast(COMPUTE_DTYPE))
    copied: Sublayer
    if isinstance(sublayer, AttentionSublayer):
        attention = _with_linears(sublayer.attention, lambda weight, bias: kind(weight, bias, dtype))
        copied = AttentionSublayer(before, attention, sublayer.after, sublayer.window, sublayer.rotary)
    else:
        mlp = _with_linears(sublayer.mlp, lambda weight, bias: kind(weight, bias, COMPUTE_DTYPE))
        copied = MLPSublayer(before, mlp, sublayer.after)
    copied.num_weights = sublayer.num_weights  # and not bytes
    return copied


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self._dtype)


MakeLinear = Callable[[Tensor, Tensor | None], QuantizedLinear]


def _with_linears(module: nn.Module, make: MakeLinear) -> nn.Module:
    """A module over the same parts, in which other linear layers take the place of the plain ones."""
    linear = _plain_linear(module)
    if linear is not None:
        return make(linear.weight, linear.bias)
    if not any(True for _ in _plain_linears(module)):
        return module
    replaced: dict[str, nn.Module] = {}
    children = dict(module.named_children())
    for names in SIBLINGS:
        together = [_plain_linear(children[name]) if name in children else None for name in names]
        if all(together):
            replaced |= zip(names, _as_one(cast("list[nn.Linear]", together), make), strict=True)
    for name, child in children.items():
        if name not in replaced:
            replaced[name] = _with_linears(child, make)
    twin = shared_copy(module)
    twin._modules |= replaced
    return twin


def _as_one(linears: Sequence[nn.Linear], make: MakeLinear) -> list[nn.Module]:
    """Linear layers that get the same input, in a module for each that gives its part of the output."""
    joined = make(torch.cat([linear.weight for linear in linears]), joined_bias(linears))
    joint = JointLinear(joined, [linear.out_features for linear in linears])
    return [JointPart(joint, index) for index in range(len(linears))]


class JointLinear(nn.Module):
    """Several linear layers with the same input as one, whose outputs are asked for one after the other.

    Args:
        linear: All of them.
        sizes: The number of outputs of each.
    """

    def __init__(self, linear: QuantizedLinear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, list(sizes)
        self._latest: tuple[Tensor, Sequence[Tensor]] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """One output, ``[..., size]``."""
        latest = self._latest
        if latest is None or latest[0] is not x:
            latest = x, self.linear(x).split(self.sizes, dim=-1)
        # In one assignment, because several threads may run the same draft: at worst something is computed twice.
        self._latest = None if index == len(self.sizes) - 1 else latest
        return latest[1][index]


class JointPart(nn.Module):
    """One of several linear layers that run as one."""

    def __init__(self, joint: JointLinear, index: int) -> None:
        super().__init__()
        self.joint, self._index = joint, index

    def forward(self, x: Tensor) -> Tensor:
        return self.joint.part(x, self._index)


def _plain_linear(module: nn.Module) -> nn.Linear | None:
    """The plain linear layer that a module is, or is with its adapters merged; None if it is no such thing."""
    if not _is_plain(_without_adapters(module)):
        return None
    if isinstance(module, PackedLinear):
        return module.plain()
    if not hasattr(module, "get_base_layer"):
        return cast(nn.Linear, module)
    adapted: Any = copy.deepcopy(module)
    if not adapted.disable_adapters:
        adapted.merge()
    elif adapted.merged:
        adapted.unmerge()
    return cast(nn.Linear, adapted.get_base_layer())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer with plain weights, packed or not."""
    if isinstance(module, PackedLinear):
        return True
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or is_patched(module):
        return False
    return module.weight.dtype in _PLAIN and not module.weight.is_meta


def _without_adapters(module: nn.Module) -> nn.Module:
    """What PEFT's adapters are around, as PEFT calls it; another module is it itself."""
    base: Any = getattr(module, "get_base_layer", None)
    return module if base is None else cast(nn.Module, base())


def _plain_linears(module: nn.Module) -> Iterator[nn.Linear]:
    """The plain linear layers in a module, adapters not merged."""
    base = _without_adapters(module)
    if _is_plain(base):
        yield cast(nn.Linear, base)
        return
    for child in module.children():
        yield from _plain_linears(child)


def _what_is_not_plain(module: nn.Module) -> Iterator[str]:
    """What of a module cannot be copied at lower precision, human-readable."""
    base = _without_adapters(module)
    if _is_plain(base):
        return
    if is_patched(base):
        yield f"a {type(base).__name__} runs something else than its class does, which a copy would not"
    for weight in chain(base.parameters(recurse=False), base.buffers(recurse=False)):
        if weight.dim() > 1 or not weight.is_floating_point() or weight.is_meta:
            yield f"a {type(base).__name__} has no plain weights (quantized already, or offloaded)"
    for child in base.children():
        yield from _what_is_not_plain(child)


def _quantized_in(sublayer: Sublayer) -> Iterator[QuantizedLinear]:
    return (part for part in _module_of(sublayer).modules() if isinstance(part, QuantizedLinear))


@torch.inference_mode()
def _runs_on(device: torch.device, kind: type[QuantizedLinear]) -> bool:
    """Whether a device multiplies by quantized weights, for narrow and for wide passes, and rightly."""
    weight = torch.linspace(-1, 1, _PROBE * _PROBE, device=device).view(_PROBE, _PROBE)
    narrow = torch.eye(_PROBE, device=device)[: min(kind.most_rows, _PROBE)]
    wide = torch.eye(kind.most_rows + 1, _PROBE, device=device)
    try:
        linear = kind(weight, None, weight.dtype)
        return all(torch.allclose(linear(rows), rows @ weight.T, atol=_PROBE_ERROR) for rows in (narrow, wide))
    except (RuntimeError, AttributeError):  # no kernel on this device, or none in this version
        return False
