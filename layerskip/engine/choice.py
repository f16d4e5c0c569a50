"""Choosing an engine by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerskip.engine.costs import calibrate
from layerskip.engine.eager import EagerEngine
from layerskip.engine.graphs import GraphEngine
from layerskip.errors import InvalidInputError

if TYPE_CHECKING:
    from layerskip.stack.model import LayerSkipModel

ENGINES = ("eager", "cuda-graphs")


def use_engine(model: LayerSkipModel, name: str) -> None:
    """Let a model run its passes by an engine, the eager one calibrated to this machine.

    Args:
        model: The model.
        name: ``eager`` or ``cuda-graphs``.

    Raises:
        InvalidInputError: There is no such engine, or the model does not lie on one CUDA device.
    """
    if name not in ENGINES:
        raise InvalidInputError(f"engine '{name}' is unknown; expected {' or '.join(ENGINES)}")
    if name == "cuda-graphs":
        model.engine = GraphEngine(model)
        return
    model.engine = EagerEngine(model)
    calibrate(model)
