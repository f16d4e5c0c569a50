"""``layerskip dashboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.common import DEFAULT_STORAGE, DebugOption, JsonOption, StorageOption, print_json, stderr
from layerskip.errors import InvalidProfileError

# What a search writes by default.
_USUAL_PROFILE = Path("draft_profile.json")


def dashboard(
    storage: StorageOption = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on. The dashboard has no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8080,
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            help="A draft profile to attach to its study; repeatable.",
            show_default="draft_profile.json, if it exists",
        ),
    ] = None,
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder for copies of profiles.", show_default="in the cache folder")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve the Optuna dashboard until Ctrl-C, with figures and notes attached to the studies."""
    from layerskip.checkpoints import cache_folder
    from studies.dashboard import serve
    from studies.storage import open_existing_storage
    from studies.study import our_studies

    def announce(url: str) -> None:
        if json:
            print_json({"url": url})
        stderr.print(f"dashboard on {url}; Ctrl-C stops it")

    database = open_existing_storage(storage)
    serve(
        database,
        host=host,
        port=port,
        artifacts=artifacts or cache_folder() / "artifacts",
        profiles=profile or _usual_profile(our_studies(database)),
        when_ready=announce,
    )


def _usual_profile(studies: list[str]) -> list[Path]:
    """The profile in the working folder, if one of these studies found it."""
    from layerskip import DraftProfile

    try:
        return [_USUAL_PROFILE] * (DraftProfile.load(_USUAL_PROFILE).provenance.study in studies)
    except InvalidProfileError:
        return []
