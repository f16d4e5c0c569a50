"""Errors that a user can act on. Each message is one line: the thing, what is wrong, what to do."""

from __future__ import annotations

import errno
import re

# Messages of libraries that ran out of memory, with the size that they asked for.
_NO_MEMORY = re.compile("can't allocate memory|cannot allocate memory|not enough memory|out of memory", re.IGNORECASE)
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMGT]?i?B)|tried to allocate (\d+) bytes")


class LayerSkipError(Exception):
    """Base of every error that layerskip raises on purpose."""


class InvalidInputError(LayerSkipError, ValueError):
    """An argument, a prompt or an option cannot be used as it is."""


class InvalidProfileError(LayerSkipError, ValueError):
    """A draft profile cannot be read, or does not belong to the model it was given."""


class UnsupportedModelError(LayerSkipError):
    """The model is of a kind that layerskip cannot split into sublayers."""


class CheckpointError(LayerSkipError):
    """A model could not be found or loaded."""


class HubError(LayerSkipError):
    """The Hub is unreachable, or a file there is missing or forbidden."""


class ExportError(LayerSkipError):
    """A draft cannot be exported, or not to that folder."""


class NotANumberError(LayerSkipError):
    """The model's scores are not numbers, so that no token can be chosen."""


class MissingDependencyError(LayerSkipError):
    """An optional package is not installed."""


class CaptureError(LayerSkipError):
    """A pass cannot be captured as a CUDA graph."""


class LosslessnessError(LayerSkipError):
    """Speculative and plain decoding gave different tokens: a bug in layerskip, not a slow draft."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's class where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def out_of_memory(error: BaseException) -> str | None:
    """One line on what to lower, if an error is about memory that ran out on a GPU or in main memory; else None.

    There is no single class for it: PyTorch raises a ``torch.OutOfMemoryError`` for a GPU and a plain ``RuntimeError``
    for main memory, Python a ``MemoryError``, and the system an ``OSError``.
    """
    text = str(error)
    system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    reported = isinstance(error, RuntimeError) and _NO_MEMORY.search(text) is not None
    if not (system or reported or isinstance(error, MemoryError)):
        return None
    where = "on the GPU" if "CUDA" in text or type(error).__name__ == "OutOfMemoryError" else "in main memory"
    wanted = _WANTED.search(text)
    amount = "" if wanted is None else f" (wanted {wanted[1] or _size(int(wanted[2]))} more)"
    return (
        f"out of memory {where}{amount}: lower --max-new-tokens, shorten the prompts, take a shorter type (--dtype "
        "bfloat16) or another --device, or end other programs there"
    )


def _size(number: float) -> str:
    """A number of bytes as a text."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"
