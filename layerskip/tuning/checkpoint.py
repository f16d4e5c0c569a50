"""Where a training stands, on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from layerskip.files import write_bytes_atomically

_COUNTERS = ("epoch", "batch", "positions", "seconds", "best_loss", "misses")


@dataclass
class TrainingState:
    """Where a training stands.

    Attributes:
        best: The parameters' values when held-out texts were predicted best.
        best_loss: The loss on held-out texts then.
        misses: Looks in a row that were not better.
        epoch: Epochs done.
        batch: Batches done in the epoch after them.
        positions: Positions learned from, in all epochs.
        seconds: Time spent.
        values: The parameters' values where it was read from disk; empty otherwise.
        moments: Those of AdamW, likewise.
    """

    best: dict[str, Tensor]
    best_loss: float
    misses: int
    epoch: int
    batch: int
    positions: int
    seconds: float
    values: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]

    @classmethod
    def fresh(cls, parameters: Mapping[str, nn.Parameter]) -> TrainingState:
        """Before the first step."""
        best = {name: value.detach().clone() for name, value in parameters.items()}
        return cls(best, float("inf"), 0, 0, 0, 0, 0.0, {}, {})

    def put_into(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Bring parameters and optimizer to where they were when it was written."""
        state = {}
        for number, (name, parameter) in enumerate(parameters.items()):
            parameter.data.copy_(self.values[name])
            moments = {key: self.moments[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in self.moments}
            if moments:
                state[number] = moments
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def write_state(
    path: Path, state: TrainingState, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write where a training stands, so that a killed process leaves the old state or the new one.

    Raises:
        OSError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {f"value.{name}": parameter for name, parameter in parameters.items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"moment.{key}.{name}": moments[key] for key in _MOMENTS if key in moments}
    counters = json.dumps({name: getattr(state, name) for name in _COUNTERS})
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes_atomically(path, save(content, metadata={"counters": counters}))


def read_state(path: Path, like: TrainingState) -> TrainingState | None:
    """Where a training stands; None if it is not there, not whole, or of other parameters.

    Args:
        path: The file.
        like: A fresh state of the same parameters.
    """
    try:
        with safe_open(path, "pt") as file:
            counters = json.loads(file.metadata()["counters"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    parts: dict[str, dict[str, Tensor]] = {"value": {}, "best": {}, "moment": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    if {name: value.shape for name, value in parts["value"].items()} != {n: v.shape for n, v in like.best.items()}:
        return None
    return TrainingState(**counters, best=parts["best"], values=parts["value"], moments=parts["moment"])
