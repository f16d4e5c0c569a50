"""A served storage: what ``layerskip studies serve`` runs, in a process of its own, with heartbeats of a second."""

import os
import socket
from contextlib import contextmanager, suppress

import optuna

from studies.server import serve
from studies.storage import open_database
from tests.studies.worker import processes


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def serve_until_ended(storage, port, ready):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with suppress(KeyboardInterrupt):
        serve(open_database(storage, heartbeat_seconds=1), host="127.0.0.1", port=port, when_ready=ready.send)


class Served:
    """A server that can be ended and started again on the same port."""

    def __init__(self, storage):
        self._storage, self._port = storage, free_port()
        self.start()

    def start(self):
        ready, says = processes.Pipe(duplex=False)
        arguments = (self._storage, self._port, says)
        self.process = processes.Process(target=serve_until_ended, args=arguments, daemon=True)
        self.process.start()
        says.close()
        self.url = ready.recv()

    def end(self, signal):
        os.kill(self.process.pid, signal)
        self.process.join()


@contextmanager
def served(storage):
    """A storage served for as long as the block runs."""
    server = Served(storage)
    try:
        yield server
    finally:
        server.process.kill()
