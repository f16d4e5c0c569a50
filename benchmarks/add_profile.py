"""Put a profile that was measured here among those that ship with layerskip, as `make profiles` does.

python -m benchmarks.add_profile smollm2 build/ready.json cpu
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from layerskip import ready_profiles
from layerskip.errors import InvalidInputError
from layerskip.profile import DraftProfile
from layerskip.ready_profiles import DeviceType, ProfileIndex, ReadyProfile
from layerskip.utils import write_atomically


def add_profile(name: str, source: Path, device_type: DeviceType) -> ReadyProfile:
    """Put a measured profile among the ready ones, in place of one of that name from the same machine and dtype.

    Args:
        name: What to call it.
        source: The profile.
        device_type: What kind of device it was measured on.

    Raises:
        InvalidProfileError: The profile is not valid, or cannot be written there.
        InvalidInputError: It was never measured, or only on the prompts of the search.
    """
    folder = ready_profiles.FOLDER
    profile = DraftProfile.load(source)
    measured = profile.measured
    if measured is None or measured.prompt_set != "held-out":
        raise InvalidInputError(f"{source}: was not measured on held-out prompts; let its search run to the end")
    # Not by the machine's name, which belongs into no file's name: by how many there are.
    ready = ready_profiles.ready_profiles()
    others = [entry for entry in ready if not _is_for(entry, name, measured.device, measured.dtype)]
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
    index = ProfileIndex(profiles=tuple(listed)).model_dump_json(indent=2)
    write_atomically(folder / ready_profiles.INDEX, f"{index}\n")
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


def main(
    name: Annotated[str, typer.Argument(help="What to call the profile.")],
    source: Annotated[Path, typer.Argument(help="The profile.")],
    device: Annotated[str, typer.Argument(help="What it was measured on: cpu or cuda.")],
) -> None:
    """Put a measured profile among the ready ones."""
    print(add_profile(name, source, cast("DeviceType", device)))  # checked by the index's entry


if __name__ == "__main__":
    typer.run(main)
