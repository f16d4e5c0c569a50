"""The Optuna dashboard on a study's storage."""

from __future__ import annotations

from collections.abc import Callable
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import BaseStorage

from layerskip.errors import InvalidInputError, MissingDependencyError


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Leave the terminal alone."""


class _Server(ThreadingMixIn, WSGIServer):
    """Answers requests in threads of their own, so that Ctrl-C always reaches the one that serves."""

    daemon_threads = True


def serve(storage: BaseStorage, *, host: str, port: int, when_ready: Callable[[str], None]) -> None:
    """Serve the dashboard until interrupted.

    Args:
        storage: What to show.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        when_ready: Called with the dashboard's address as soon as it can be opened.

    Raises:
        MissingDependencyError: The ``dashboard`` extra is not installed.
        InvalidInputError: The address or port cannot be listened on.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise MissingDependencyError(
            "the dashboard needs the package 'optuna-dashboard'; pip install 'layerskip[dashboard]'"
        ) from error
    try:
        server = make_server(host, port, wsgi(storage), server_class=_Server, handler_class=_QuietHandler)
    except OSError as error:
        raise InvalidInputError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another with --host and --port"
        ) from error
    with server:
        when_ready(f"http://{host}:{server.server_port}/")
        server.serve_forever()
