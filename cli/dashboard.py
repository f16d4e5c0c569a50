"""``layerskip dashboard``."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import DEFAULT_STORAGE, DebugOption, JsonOption, StorageOption
from cli.output import print_json, stderr


def dashboard(
    storage: StorageOption = DEFAULT_STORAGE,
    host: Annotated[str, typer.Option(help="Address to listen on. The dashboard has no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8080,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Serve the Optuna dashboard on a storage until Ctrl-C."""
    from studies.dashboard import serve
    from studies.storage import open_existing_storage

    def announce(url: str) -> None:
        if json:
            print_json({"url": url})
        stderr.print(f"dashboard on {url}; Ctrl-C ends it")

    serve(open_existing_storage(storage), host=host, port=port, when_ready=announce)
