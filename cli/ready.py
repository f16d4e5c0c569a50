"""``python -m cli.ready``: put a profile among those that ship with layerskip. For who makes a release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.main import main

app = typer.Typer(add_completion=False)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What to call it.", show_default=False)],
    profile: Annotated[Path, typer.Argument(help="The profile that a search made.", show_default=False)],
    device_type: Annotated[str, typer.Argument(help="What it was measured on: cpu or cuda.")] = "cpu",
) -> None:
    """Copy a measured profile into the folder of ready profiles, and list it in their index."""
    from layerskip.errors import InvalidInputError
    from layerskip.ready_profiles import add_profile

    if device_type not in ("cpu", "cuda"):
        raise InvalidInputError(f"device type '{device_type}' is unknown; expected cpu or cuda")
    entry = add_profile(name, profile, "cuda" if device_type == "cuda" else "cpu")
    typer.echo(f"{entry.file}: {entry.speedup:.2f}× on {entry.device}, {entry.dtype}")


if __name__ == "__main__":
    main(app)
