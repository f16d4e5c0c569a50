"""Draft profiles that ship with layerskip, by name: for each model one, or one for each machine it was measured on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from layerskip.checkpoints import resolve_device, resolve_dtype
from layerskip.errors import InvalidProfileError
from layerskip.names import ALIASES
from layerskip.utils import device_name, dtype_name

FOLDER = Path(__file__).parent / "profiles"
INDEX = "index.json"
DeviceType = Literal["cpu", "cuda"]


class ReadyProfile(BaseModel):
    """What the index says of a profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w][\w.-]*$", description="What it is called; several may share a name.")
    file: str = Field(pattern=r"^[^/\\]+$", description="The profile, in the index's folder.")
    model: str = Field(description="Where its model comes from.")
    fingerprint: str = Field(description="Which model that is.")
    device_type: DeviceType = Field(description="What kind of device it was measured on.")
    device: str = Field(description="The device's name.")
    dtype: str = Field(description="Floating-point type of the model.")
    speedup: float = Field(gt=0, description="Measured there.")
    speedup_low: float = Field(gt=0, description="Lower end of the speedup's 95 % interval.")
    speedup_high: float = Field(gt=0, description="Upper end of the speedup's 95 % interval.")


class ProfileIndex(BaseModel):
    """The file that lists the ready profiles of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["layerskip.profile-index"] = "layerskip.profile-index"
    version: Literal[1] = 1
    profiles: tuple[ReadyProfile, ...] = ()


def ready_profiles(folder: Path | None = None) -> tuple[ReadyProfile, ...]:
    """What the index of ready profiles lists.

    Args:
        folder: Where the profiles lie; None takes those that ship with layerskip.

    Raises:
        InvalidProfileError: The index cannot be read.
    """
    path = (folder or FOLDER) / INDEX
    try:
        return ProfileIndex.model_validate_json(path.read_bytes()).profiles
    except OSError as error:
        raise InvalidProfileError(f"{path}: cannot read the index of profiles: {error.strerror}") from error
    except ValidationError as error:
        raise InvalidProfileError(f"{path}: not an index of profiles; install layerskip anew") from error


def find_profile(name: str, *, device: str = "auto", dtype: str = "auto", folder: Path | None = None) -> Path:
    """The ready profile of a name; of several the one that was measured on what is most like this machine.

    Args:
        name: Such as ``smollm2``.
        device: A torch device, as :func:`layerskip.load_checkpoint` takes it.
        dtype: Likewise.
        folder: Where the profiles lie; None takes those that ship with layerskip.

    Raises:
        InvalidProfileError: There is none of that name. The message names those that there are.
        InvalidInputError: The device or dtype is unknown or not available.
    """
    every = ready_profiles(folder)
    named = [entry for entry in every if entry.name == name]
    if not named:
        raise InvalidProfileError(_unknown(name, every))
    where = resolve_device(device)
    precision = dtype_name(resolve_dtype(dtype, where))

    def likeness(entry: ReadyProfile) -> tuple[bool, bool, bool, float]:
        alike = entry.device_type == where.type, entry.dtype == precision, entry.device == device_name(where)
        return (*alike, entry.speedup)

    return (folder or FOLDER) / max(named, key=likeness).file


def _unknown(name: str, every: Sequence[ReadyProfile]) -> str:
    """One line on a name that no ready profile has."""
    names = sorted({entry.name for entry in every})
    listed = f"there are: {', '.join(names)}" if names else "there is none yet"
    similar = difflib.get_close_matches(name, names, n=1)
    if similar:
        advice = f"did you mean '{similar[0]}'?"
    elif name in ALIASES:
        advice = f"make a profile with 'layerskip search {name}'"
    else:
        advice = "'layerskip search MODEL' makes one"
    return f"profile '{name}': no such file, and no ready profile of that name ({listed}); {advice}"
