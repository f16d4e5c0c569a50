"""Writing files so that nothing finished is lost."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerskip.errors import LayerSkipError


def write_atomically(path: Path, text: str) -> None:
    """Like :func:`write_bytes_atomically`, for a text, as UTF-8."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a killed process, leaves the old content or the new, never a part.

    Raises:
        OSError: The folder is missing, read-only or full. The old file is untouched.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device or a pipe would be replaced by a file
        raise OSError(errno.EINVAL, "not a regular file")
    # Not the process's id: containers that share a folder have the same ones.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def keeping(path: Path, what: str) -> Iterator[None]:
    """Say in one line what cannot be kept in the cache, and what to do.

    Args:
        path: Where it is written inside.
        what: What it is, for people.

    Raises:
        LayerSkipError: Something inside raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise LayerSkipError(
            f"{path}: cannot keep {what}: {error.strerror}; make room, or set LAYERSKIP_CACHE to another folder"
        ) from error
