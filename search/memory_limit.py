"""What the memory's speed allows plain decoding."""

from __future__ import annotations

from layerskip.engine.bandwidth import bytes_read, measure_read_bandwidth
from layerskip.model import LayerSkipModel
from search.machine_lock import MachineLock
from studies.comparison import MemoryLimit


def measure_memory_limit(model: LayerSkipModel, lock: MachineLock) -> MemoryLimit | None:
    """What plain decoding is limited to by reading the weights; None for a quantized model, whose bytes vary.

    Args:
        model: The model, on one device.
        lock: Held while memory is read.
    """
    if getattr(model.hf_model, "hf_quantizer", None) is not None:
        return None
    with lock.exclusive():
        return MemoryLimit(bytes_read(model, model.target_stack), measure_read_bandwidth(model.device))
