"""Make an engine by its name."""

from __future__ import annotations

import difflib

import torch

from layerskip.engine.base import Engine
from layerskip.engine.cost_measurement import load_costs
from layerskip.engine.cuda_graphs import GraphEngine
from layerskip.engine.eager import EagerEngine
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.names import ENGINES


def check_engine(name: str, device: torch.device) -> None:
    """Check, before a model is loaded, that an engine can run it.

    Args:
        name: The engine's name.
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


def make_engine(model: LayerSkipModel, name: str = EagerEngine.name) -> Engine:
    """An engine for a model, with what its passes cost on this machine: measured now, or read from the cache.

    Args:
        model: The model.
        name: ``eager`` or ``cuda-graphs``.

    Raises:
        InvalidInputError: There is no such engine, or the model is not on one CUDA device.
    """
    check_engine(name, model.device)
    engine: Engine = GraphEngine(model) if name == GraphEngine.name else EagerEngine(model)
    engine.costs = load_costs(engine)
    return engine
