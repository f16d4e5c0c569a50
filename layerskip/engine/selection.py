"""Make an engine by its name, or the one that suits the machine."""

from __future__ import annotations

import difflib

import torch

from layerskip.checks import instance, shown
from layerskip.engine.base import Engine
from layerskip.engine.cost_measurement import load_costs
from layerskip.engine.cuda_graphs import GraphEngine
from layerskip.engine.eager import EagerEngine
from layerskip.engine.kernel_measurement import load_kernel_seconds
from layerskip.engine.packed import PackedEngine, why_not_packed
from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.names import AUTO, ENGINES


def check_engine(name: str, device: torch.device) -> None:
    """Check, before a model is loaded, that an engine can run it.

    Args:
        name: The engine's name.
        device: Where the model will be.

    Raises:
        InvalidInputError: There is no such engine, or it needs another device.
    """
    if not isinstance(name, str):
        raise InvalidInputError(f"engine: expected a name, got {shown(name)}")
    if name not in ENGINES:
        similar = difflib.get_close_matches(name, ENGINES, n=1)
        guess = f"; did you mean '{similar[0]}'?" if similar else ""
        raise InvalidInputError(
            f"engine '{name}' is unknown; expected {', '.join(ENGINES[:-1])} or {ENGINES[-1]}{guess}"
        )
    if name == GraphEngine.name and device.type != "cuda":
        raise InvalidInputError(f"engine '{name}': {GraphEngine.needs}; use the {EagerEngine.name} engine")
    if name == PackedEngine.name and device.type != "cpu":
        raise InvalidInputError(f"engine '{name}': {PackedEngine.needs}; use the {EagerEngine.name} engine")


def make_engine(model: LayerSkipModel, name: str = EagerEngine.name, *, in_place: bool = False) -> Engine:
    """An engine for a model, with what its passes cost on this machine: measured now, or read from the cache.

    Args:
        model: The model.
        name: ``eager``, ``packed`` or ``cuda-graphs``; ``auto`` is ``cuda-graphs`` for a model on one CUDA device,
            ``packed`` where a quick measurement says that this CPU runs packed weights faster, and ``eager`` elsewhere.
        in_place: Whether packed weights may take the place of the model's plain ones, so that there is no second copy;
            as in :class:`PackedEngine` and :class:`GraphEngine`. Where this CPU is clearly faster with plain weights
            for a single row, as in plain decoding, both are kept.

    Raises:
        InvalidInputError: There is no such engine, or it cannot run this model.
    """
    instance("model", model, LayerSkipModel, "; wrap it: LayerSkipModel(model)")
    check_engine(name, model.device)
    engine = _engine(model, name, in_place=in_place)
    engine.costs = load_costs(engine)
    return engine


def on_one_cuda_device(model: LayerSkipModel) -> bool:
    """Whether passes of a model can be captured as CUDA graphs."""
    devices = {model.device, *(sublayer.device for sublayer in model.sublayers)}
    return len(devices) == 1 and model.device.type == "cuda"


def _engine(model: LayerSkipModel, name: str, *, in_place: bool) -> Engine:
    if name == GraphEngine.name or (name == AUTO and on_one_cuda_device(model)):
        return GraphEngine(model, in_place=in_place)
    kernels = None
    if name in (AUTO, PackedEngine.name) and why_not_packed(model) is None:
        kernels = load_kernel_seconds(model)
    if (name == AUTO and not (kernels is not None and kernels.packing_pays)) or name == EagerEngine.name:
        return EagerEngine(model)
    if kernels is not None and kernels.one_row_is_faster_plain:
        return PackedEngine(model, plain_one_row=True)
    return PackedEngine(model, in_place=in_place)
