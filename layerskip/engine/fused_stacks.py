"""Stacks whose sublayers run in fewer operators, in place of the model's modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from layerskip.drafting.quantized_linear import COMPUTE_DTYPE
from layerskip.engine.fused_sublayers import Fusing
from layerskip.model import LayerSkipModel
from layerskip.sublayers import AttentionSublayer, MLPSublayer, Stack, Step


class FusedStacks:
    """The stacks of one model's drafts, over what an engine runs in place of the model's sublayers.

    Args:
        model: The model.
        steps: What runs in place of each of its sublayers, by their index.
        fusing: Finds copies at lower precision in fewer operators.
    """

    def __init__(self, model: LayerSkipModel, steps: Mapping[int, Step], fusing: Fusing) -> None:
        self._steps = {id(sublayer): steps[index] for index, sublayer in enumerate(model.sublayers)}
        self._fusing = fusing
        self._stacks: WeakKeyDictionary[Stack, Stack] = WeakKeyDictionary()
        self._copies: WeakKeyDictionary[Step, Step] = WeakKeyDictionary()

    def of(self, stack: Stack) -> Stack:
        """The same stack, over the engine's own sublayers, and copies at lower precision in fewer operators."""
        fused = self._stacks.get(stack)
        if fused is None:
            steps = tuple((index, self._steps.get(id(step)) or self._fused_copy(step)) for index, step in stack.steps)
            fused = self._stacks[stack] = replace(stack, steps=steps)
        return fused

    def _fused_copy(self, step: Step) -> Step:
        """A copied sublayer in fewer operators; any other step as it is."""
        if not isinstance(step, AttentionSublayer | MLPSublayer):
            return step
        if step not in self._copies:
            self._copies[step] = self._fusing.fused(step, self._fusing.probe(step), COMPUTE_DTYPE)
        return self._copies[step]
