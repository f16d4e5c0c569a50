"""``layerskip dashboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_STORAGE, DebugOption, JsonOption, StorageOption
from cli.output import print_json, stderr


def dashboard(
    storage: StorageOption = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on. The dashboard has no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8080,
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            help="A draft profile to attach to its study; repeatable.",
            show_default="draft_profile.json, if it is there",
        ),
    ] = None,
    artifacts: Annotated[
        Path | None, typer.Option(help="Folder for copies of profiles.", show_default="in the cache folder")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve the Optuna dashboard on a storage until Ctrl-C, with figures and notes attached to its studies."""
    from layerskip.checkpoints import cache_folder
    from studies.dashboard import serve
    from studies.storage import open_existing_storage
    from studies.study import studies_of_ours

    def announce(url: str) -> None:
        if json:
            print_json({"url": url})
        stderr.print(f"dashboard on {url}; Ctrl-C ends it")

    database = open_existing_storage(storage)
    serve(
        database,
        host=host,
        port=port,
        artifacts=artifacts or cache_folder() / "artifacts",
        profiles=profile or _found(studies_of_ours(database)),
        when_ready=announce,
    )


def _found(studies: list[str]) -> list[Path]:
    """What a search leaves in the working folder, if one of these studies left it."""
    from layerskip.errors import InvalidProfileError
    from layerskip.profile import DraftProfile

    left = Path("draft_profile.json")
    try:
        return [left] * (DraftProfile.load(left).provenance.study in studies)
    except InvalidProfileError:
        return []
