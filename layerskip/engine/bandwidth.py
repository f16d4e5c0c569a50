"""How fast a device reads its memory: what limits decoding, in which each pass reads every weight once."""

from __future__ import annotations

import torch

from layerskip.model import LayerSkipModel
from layerskip.sublayers import Stack
from layerskip.utils import device_seconds

# More than caches hold.
_BYTES = 2**30
_REPEATS = 5


@torch.inference_mode()
def measure_read_bandwidth(device: torch.device, nbytes: int = _BYTES) -> float:
    """Bytes a second that a device reads from its memory: those of a sum over a large tensor, its fastest repeat.

    Args:
        device: The device.
        nbytes: Memory that it needs for a moment; more than caches hold.
    """
    values = torch.ones(nbytes // torch.float32.itemsize, device=device)
    seconds = []
    for _ in range(1 + _REPEATS):
        started = device_seconds(device)
        values.sum()
        seconds.append(device_seconds(device) - started)
    return nbytes / min(seconds[1:])  # the first chooses kernels


def bytes_read(model: LayerSkipModel, stack: Stack) -> int:
    """Bytes of the weights that a pass of a stack reads at the model's own precision, its head included.

    Args:
        model: The model.
        stack: The stack; one over the whole vocabulary.
    """
    weights = sum(step.num_weights for _, step in stack.steps) + model.vocab_size * int(model.config.hidden_size)
    return weights * model.dtype.itemsize
