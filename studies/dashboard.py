"""The Optuna dashboard on a storage, with what layerskip has to show of its studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import BaseStorage

from layerskip.errors import InvalidInputError, MissingDependencyError
from studies.pins import artifact_store, attach_figures, attach_profile
from studies.study import studies_of_ours


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Leave the terminal alone."""


class _Server(ThreadingMixIn, WSGIServer):
    """Answers requests in threads of their own, so that Ctrl-C always reaches the one that serves."""

    daemon_threads = True


def serve(
    storage: BaseStorage,
    *,
    host: str,
    port: int,
    artifacts: Path,
    profiles: Sequence[Path] = (),
    when_ready: Callable[[str], None],
) -> None:
    """Serve the dashboard until interrupted, after attaching figures and notes to the studies that layerskip made.

    Args:
        storage: What to show.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        artifacts: Folder for copies of profiles; made if it is not there.
        profiles: Draft profiles to attach to the studies that they come from.
        when_ready: Called with the dashboard's address as soon as it can be opened.

    Raises:
        MissingDependencyError: The ``dashboard`` extra is not installed.
        InvalidProfileError: A profile cannot be read.
        InvalidInputError: A profile comes from no study of this storage, or the address or port cannot be listened on.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise MissingDependencyError(
            "the dashboard needs the package 'optuna-dashboard'; pip install 'layerskip[dashboard]'"
        ) from error
    store = artifact_store(artifacts)
    for profile in profiles:
        attach_profile(storage, profile, store)
    app = wsgi(storage, artifact_store=store)
    try:
        server = make_server(host, port, app, server_class=_Server, handler_class=_QuietHandler)
    except OSError as error:
        raise InvalidInputError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another with --host and --port"
        ) from error
    for name in studies_of_ours(storage):
        attach_figures(storage, name)
    with server:
        when_ready(f"http://{host}:{server.server_port}/")
        server.serve_forever()
