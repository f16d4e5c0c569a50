"""Sublayers, and the stack of them that a pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from layerskip.families import Family, setting
from layerskip.kv_cache import KVCache
from layerskip.names import Precision
from layerskip.skip_set import SkipSet


@dataclass(frozen=True)
class PassContext:
    """The inputs that all sublayers of one forward pass share.

    Args:
        rotary: Cosines and sines of the new positions, each ``[1, n, head_dim]``, by layer type (None: one for all).
        masks: Attention mask by sliding window (None: no window).
        cache: Keys and values of the text before.
    """

    rotary: Mapping[str | None, tuple[Tensor, Tensor]]
    masks: Mapping[int | None, Tensor | None]
    cache: KVCache
    _elsewhere: dict[torch.device, PassContext] = field(default_factory=dict, repr=False)
    _repeated: dict[tuple[int | None, int], Tensor] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> PassContext:
        """The same on another device, for models that lie on several; moved once a pass."""
        if all(cos.device == device for cos, _ in self.rotary.values()):
            return self
        if device not in self._elsewhere:
            rotary = {kind: (cos.to(device), sin.to(device)) for kind, (cos, sin) in self.rotary.items()}
            masks = {window: None if mask is None else mask.to(device) for window, mask in self.masks.items()}
            self._elsewhere[device] = PassContext(rotary, masks, self.cache)
        return self._elsewhere[device]

    def repeated_mask(self, window: int | None, times: int) -> Tensor | None:
        """A mask for queries that share a key as rows of one attention, those of the first head first.

        Args:
            window: Whose mask.
            times: How many queries share a key.

        Returns:
            ``[1, 1, times * n, keys]``, made once a pass; for one new position, ``[1, 1, 1, keys]``.
        """
        mask = self.masks[window]
        if mask is None or times == 1 or mask.shape[2] == 1:
            return mask
        if (window, times) not in self._repeated:
            self._repeated[window, times] = mask.repeat(1, 1, times, 1)
        return self._repeated[window, times]


def attend(
    before: nn.Module,
    attention: nn.Module,
    after: nn.Module,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
) -> Tensor:
    """``x + after(self_attn(before(x)))``; ``cache`` has the ``update`` that the attention module calls."""
    # By position: transformers calls the cache past_key_values until 5.23, and cache from 5.24 on.
    change, _ = attention(before(x), rotary, mask, cache)
    out: Tensor = x + after(change)
    return out


def feed_forward(before: nn.Module, mlp: nn.Module, after: nn.Module, x: Tensor) -> Tensor:
    """``x + after(mlp(before(x)))``."""
    out: Tensor = x + after(mlp(before(x)))
    return out


class AttentionSublayer:
    """``x <- x + after(self_attn(before(x)))``, over the model's own modules.

    Args:
        before: Norm of the hidden states; an identity where there is none.
        attention: The attention module.
        after: Norm or scale of its output before it is added; likewise.
        window: Its sliding window, in positions; None sees the whole text.
        rotary: The layer type by which it finds its rotary embedding; None where there is one for all.

    Attributes:
        function: Computes it: :func:`attend`, or a compiled one.
    """

    remembers: ClassVar = False

    def __init__(
        self, before: nn.Module, attention: nn.Module, after: nn.Module, window: int | None, rotary: str | None
    ) -> None:
        self.before, self.attention, self.after = before, attention, after
        self.window, self.rotary = window, rotary
        self._weight, self.num_weights = next(weights_of(attention)), _num_weights(attention)
        self.function: Callable[..., Tensor] = attend

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self._weight.device

    @property
    def module(self) -> nn.Module:
        """The attention module, which can be replaced by one that computes the same."""
        return self.attention

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.attention, self._weight = module, next(weights_of(module))

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        x, here = x.to(self.device), context.on(self.device)
        rotary, mask = here.rotary[self.rotary], here.masks[self.window]
        return self.function(self.before, self.attention, self.after, x, rotary, mask, here.cache)


class MLPSublayer:
    """``x <- x + after(mlp(before(x)))``, over the model's own modules.

    Attributes:
        function: Computes it: :func:`feed_forward`, or a compiled one.
    """

    remembers: ClassVar = False

    def __init__(self, before: nn.Module, mlp: nn.Module, after: nn.Module) -> None:
        self.before, self.mlp, self.after = before, mlp, after
        self._weight, self.num_weights = next(weights_of(mlp)), _num_weights(mlp)
        self.function: Callable[..., Tensor] = feed_forward

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self._weight.device

    @property
    def module(self) -> nn.Module:
        """The MLP module, which can be replaced by one that computes the same."""
        return self.mlp

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.mlp, self._weight = module, next(weights_of(module))

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        return self.function(self.before, self.mlp, self.after, x.to(self.device))


Sublayer = AttentionSublayer | MLPSublayer


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """A module's weights; some quantized modules (GPTQ, AWQ) have buffers in place of parameters."""
    return chain(module.parameters(), module.buffers())


def _num_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in weights_of(module))


class Scaled(nn.Module):
    """Scale a module's output by a constant.

    Args:
        module: The module.
        factor: The constant.
    """

    def __init__(self, module: nn.Module, factor: float) -> None:
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x) * self.factor
        return out


def sublayers_of(layers: nn.ModuleList, family: Family, config: PreTrainedConfig) -> tuple[Sublayer, ...]:
    """Flatten decoder layers into ``2 * len(layers)`` sublayers, attention and MLP in turn."""
    return tuple(chain.from_iterable(sublayers_in(layer, i, family, config) for i, layer in enumerate(layers)))


def sublayers_in(
    layer: nn.Module, index: int, family: Family, config: PreTrainedConfig
) -> tuple[AttentionSublayer, MLPSublayer]:
    """The two sublayers of a decoder layer.

    Args:
        layer: The layer.
        index: Its number, or for a draft layer that of the model's layer it is like: layers of some families differ,
            for instance in their window.
        family: Of the model.
        config: The model's.
    """
    norms, factor = family.norms, setting(config, family.residual_multiplier)

    def before(name: str | None) -> nn.Module:
        return nn.Identity() if name is None else layer.get_submodule(name)

    def after(name: str | None) -> nn.Module:
        return before(name) if factor == 1 else Scaled(before(name), factor)

    attention = AttentionSublayer(
        before(norms.before_attention),
        layer.get_submodule("self_attn"),
        after(norms.after_attention),
        family.window(config, index),
        family.rotary(config, index),
    )
    return attention, MLPSublayer(before(norms.before_mlp), layer.get_submodule("mlp"), after(norms.after_mlp))


class Step(Protocol):
    """One step up the stack: a sublayer or a copy of it, or a bridge or draft layer in place of several.

    Attributes:
        remembers: Whether it keeps keys and values of its own, which the target model's passes do not write, so that it
            has to see the whole text itself.
        num_weights: How many weights it reads.
    """

    remembers: ClassVar[bool]

    @property
    def num_weights(self) -> int: ...

    def __call__(self, x: Tensor, context: PassContext) -> Tensor:
        """Hidden states ``[1, n, hidden_size]`` before the step; those after it, of the same shape."""


StackKey = tuple[tuple[tuple[int, int], ...], int, int]


@dataclass(frozen=True, eq=False)
class Stack:
    """The target model's sublayers, or a draft's: the same with some skipped, the others as they are or copies of them.

    Args:
        steps: The steps to run, each with the index of its sublayer or of the first that it replaces, ascending.
        shared: Number of sublayers at the bottom that are the target model's; all of them in the target model itself.
        token_ids: ``[n]``, the tokens that the head scores; None for the whole vocabulary.
        lm_head_rows: ``[n, hidden_size]``, the head's weights for these tokens.
        precision: Of the sublayers that are kept, and of the head.
        head: Scores these tokens, or all, at lower precision; None scores with the model's own weights.
    """

    steps: tuple[tuple[int, Step], ...]
    shared: int
    token_ids: Tensor | None = None
    lm_head_rows: Tensor | None = field(default=None, repr=False)
    precision: Precision = "full"
    head: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def skipping(
        cls,
        sublayers: Sequence[Step],
        skip_set: SkipSet,
        stand_ins: Mapping[int, Step],
        copies: Mapping[int, Step] | None = None,
    ) -> Stack:
        """The stack of a draft.

        Args:
            sublayers: The target model's.
            skip_set: Sublayers to skip.
            stand_ins: Replacements of runs of skipped sublayers, by the index of the run's first.
            copies: Copies of kept sublayers at lower precision, which run in their place.
        """
        kept = {index: sublayers[index] for index in skip_set.kept} | dict(copies or {})
        others = (index for index, own in enumerate(sublayers) if kept.get(index) is not own)
        shared = next(others, len(sublayers))
        return cls(tuple(sorted((kept | dict(stand_ins)).items(), key=lambda step: step[0])), shared)

    def with_head_of(self, other: Stack) -> Stack:
        """The same sublayers with the head of another draft of the same model and precision."""
        return replace(self, token_ids=other.token_ids, lm_head_rows=other.lm_head_rows, head=other.head)

    @property
    def key(self) -> StackKey:
        """Equal for stacks that compute the same with the same modules, while one of them is alive."""
        return tuple((index, id(step)) for index, step in self.steps), id(self.lm_head_rows), id(self.head)

    @property
    def remembers(self) -> bool:
        """Whether a step keeps keys and values of its own, so that it has to see the whole text."""
        return self.remembers_from is not None

    @property
    def remembers_from(self) -> int | None:
        """The index of the first step that keeps keys and values of its own; None if none does."""
        return next((index for index, step in self.steps if step.remembers), None)

    def run(self, x: Tensor, context: PassContext, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the steps from sublayer ``start`` on and before sublayer ``stop``.

        Args:
            x: ``[1, n, hidden_size]``, hidden states before sublayer ``start``.
            context: Of the pass.
            start: Index of the first sublayer to run.
            stop: Index of the first sublayer not to run; None runs to the top.
        """
        for index, step in self.steps:
            if index >= start and (stop is None or index < stop):
                x = step(x, context)
        return x
