"""Choosing an engine by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerskip.engine.costs import calibrate
from layerskip.engine.eager import EagerEngine
from layerskip.engine.graphs import GraphEngine
from layerskip.errors import InvalidInputError

if TYPE_CHECKING:
    from layerskip.stack.model import LayerSkipModel

ENGINES = (EagerEngine.name, GraphEngine.name)


def use_engine(model: LayerSkipModel, name: str) -> None:
    """Let a model run its passes by an engine, calibrated to this machine.

    Args:
        model: The model.
        name: ``eager`` or ``cuda-graphs``.

    Raises:
        InvalidInputError: There is no such engine, or the model does not lie on one CUDA device.
    """
    if name not in ENGINES:
        raise InvalidInputError(f"engine '{name}' is unknown; expected {' or '.join(ENGINES)}")
    model.engine = GraphEngine(model) if name == GraphEngine.name else EagerEngine(model)
    calibrate(model)
