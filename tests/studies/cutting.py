"""A wire to a database server that can be cut at the worst moment: when a commit has gone out, and before the reply."""

import socket
import threading
from contextlib import contextmanager, suppress


class Wire:
    """Passes on to a port; once armed, the next commit of a statement goes through, and its reply does not."""

    def __init__(self, port):
        self._target = port
        self._armed = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, statement=b""):
        self._statement = statement
        self._armed.set()

    def close(self):
        self._listening.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            cut = threading.Event()
            answers = threading.Thread(target=self._pass_on_answers, args=(server, client, cut), daemon=True)
            answers.start()
            stated = False
            with suppress(OSError):
                while content := client.recv(65536):
                    stated |= self._armed.is_set() and self._statement in content
                    if b"COMMIT" in content and self._armed.is_set() and stated:
                        self._armed.clear()
                        cut.set()
                    server.sendall(content)
                server.shutdown(socket.SHUT_WR)
            answers.join()

    def _pass_on_answers(self, server, client, cut):
        with suppress(OSError):
            while content := server.recv(65536):
                if cut.is_set():  # this is the reply to the commit, which so has been done
                    self.cuts += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(content)
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def wire(port):
    """A wire to a port for as long as the block runs."""
    wire = Wire(port)
    try:
        yield wire
    finally:
        wire.close()
