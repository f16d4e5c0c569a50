"""Choosing an engine by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import torch

from layerskip.costs import calibrate
from layerskip.engine.cuda_graphs import GraphEngine
from layerskip.engine.eager import EagerEngine
from layerskip.errors import InvalidInputError
from layerskip.names import ENGINES

if TYPE_CHECKING:
    from layerskip.model import LayerSkipModel


def check_engine(name: str, device: torch.device) -> None:
    """Find out before a model is loaded that it could not run by an engine.

    Args:
        name: The engine.
        device: Where the model will be.

    Raises:
        InvalidInputError: There is no such engine, or it needs another device.
    """
    if name not in ENGINES:
        similar = difflib.get_close_matches(name, ENGINES, n=1)
        guess = f"; did you mean '{similar[0]}'?" if similar else ""
        raise InvalidInputError(f"engine '{name}' is unknown; expected {' or '.join(ENGINES)}{guess}")
    if name == GraphEngine.name and device.type != "cuda":
        raise InvalidInputError(f"engine '{name}': {GraphEngine.needs}; use the {EagerEngine.name} engine")


def use_engine(model: LayerSkipModel, name: str) -> None:
    """Let a model run its passes by an engine, calibrated to this machine.

    Args:
        model: The model.
        name: ``eager`` or ``cuda-graphs``.

    Raises:
        InvalidInputError: There is no such engine, or the model does not lie on one CUDA device.
    """
    check_engine(name, model.device)
    model.engine = GraphEngine(model) if name == GraphEngine.name else EagerEngine(model)
    calibrate(model)
