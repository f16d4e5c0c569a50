"""Tensors files of profiles that have been overwritten: found, and removed where nobody refers to them."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from pathlib import Path

_NAMES = "draft-*.safetensors"


def tensors_file_of(profile: Path) -> Path | None:
    """The tensors file that a profile on disk refers to; None if it has none, or is no profile that can be read."""
    try:
        name = json.loads(profile.read_text(encoding="utf-8"))["tensors"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Only what a profile would have named itself, in the profile's own folder.
    ours = isinstance(name, str) and fnmatch.fnmatchcase(name, _NAMES) and Path(name).name == name
    return profile.with_name(name) if ours else None


def remove_unless_referred_to(file: Path) -> None:
    """Remove a tensors file, unless a JSON file beside it names it. A file that cannot be removed stays."""
    with contextlib.suppress(OSError):
        # Looked for in the text, so that a profile that cannot be parsed keeps its tensors too.
        if not any(file.name.encode() in other.read_bytes() for other in file.parent.glob("*.json")):
            file.unlink()
