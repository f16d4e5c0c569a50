"""Being no longer root for a while: root may write everywhere."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

_NOBODY = 65534


@contextmanager
def unprivileged():
    """Run the block as a user who is not root."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(_NOBODY)
    except PermissionError:
        pytest.skip("this root may not become another user")
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def closed(folder):
    """Let nobody write in a folder while the block runs, as no root."""
    files = [file for file in folder.iterdir() if file.is_file()]
    modes = {path: path.stat().st_mode for path in (folder, *files)}
    for path in modes:
        path.chmod(0o555 if path == folder else 0o444)
    try:
        with unprivileged():
            yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def public_folder():
    """An empty folder that every user can reach, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="layerskip-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
