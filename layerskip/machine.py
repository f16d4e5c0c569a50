"""What a measurement was made on."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("layerskip", "torch", "transformers")


def device_name(device: torch.device) -> str:
    """A device's name for people: the GPU's, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"
    return str(device)


def _processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide how fast decoding is."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path, not installed
            versions[package] = "unknown"
    return versions


@dataclass(frozen=True)
class Device:
    """A device that PyTorch finds here.

    Args:
        name: What ``--device`` calls it.
        description: Its name, and how much of it there is.
        supported: Whether layerskip decodes on it.
    """

    name: str
    description: str
    supported: bool


def devices() -> list[Device]:
    """What there is to decode on, the device that ``auto`` takes first."""
    found = [_cuda_device(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    found.append(Device("cpu", device_name(torch.device("cpu")), True))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU; not supported, 'auto' takes the CPU", False))
    return found


def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    description = f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"
    return Device(f"cuda:{index}", description, True)
