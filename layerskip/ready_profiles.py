"""Draft profiles that ship with layerskip, by name: for each model one, or one for each machine it was measured on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from layerskip.checkpoints import resolve_device, resolve_dtype
from layerskip.errors import InvalidInputError, InvalidProfileError
from layerskip.names import ALIASES
from layerskip.profile import DraftProfile
from layerskip.utils import device_name, dtype_name, write_atomically

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


def add_profile(name: str, source: Path, device_type: DeviceType, *, folder: Path | None = None) -> ReadyProfile:
    """Put a measured profile among the ready ones, in place of one of that name from the same machine and dtype.

    Args:
        name: What to call it.
        source: The profile.
        device_type: What kind of device it was measured on.
        folder: Where ready profiles lie; None takes those that ship with layerskip.

    Raises:
        InvalidProfileError: The profile is not valid, or cannot be written there.
        InvalidInputError: It was never measured, or only on the prompts of the search.
    """
    folder = folder or FOLDER
    profile = DraftProfile.load(source)
    measured = profile.measured
    if measured is None or measured.prompt_set != "held-out":
        raise InvalidInputError(f"{source}: was not measured on held-out prompts; let its search run to the end")
    # Not by the machine's name, which belongs into no file's name: by how many there are.
    others = [entry for entry in ready_profiles(folder) if not _is_for(entry, name, measured.device, measured.dtype)]
    entry = ReadyProfile(
        name=name,
        file=_free_name(f"{name}-{device_type}-{measured.dtype}", [other.file for other in others]),
        model=profile.model.id,
        fingerprint=profile.model.fingerprint,
        device_type=device_type,
        device=measured.device,
        dtype=measured.dtype,
        speedup=measured.speedup,
        speedup_low=measured.speedup_low,
        speedup_high=measured.speedup_high,
    )
    profile.save(folder / entry.file)
    listed = sorted([*others, entry], key=lambda one: (one.name, one.file))
    write_atomically(folder / INDEX, ProfileIndex(profiles=tuple(listed)).model_dump_json(indent=2) + "\n")
    _remove_unused_tensors(folder, [folder / one.file for one in listed])
    return entry


def _remove_unused_tensors(folder: Path, profiles: Sequence[Path]) -> None:
    tensors = [DraftProfile.load(path).tensors for path in profiles]
    used = {one.file for one in tensors if one is not None}
    for path in folder.glob("draft-*.safetensors"):
        if path.name not in used:
            path.unlink()


def _is_for(entry: ReadyProfile, name: str, device: str, dtype: str) -> bool:
    return (entry.name, entry.device, entry.dtype) == (name, device, dtype)


def _free_name(stem: str, taken: Sequence[str]) -> str:
    number = 1
    while (file := f"{stem}{f'-{number}' * (number > 1)}.json") in taken:
        number += 1
    return file


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
