"""Files are written whole or not at all."""

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

import layerskip.utils
from layerskip.utils import write_atomically

OLD, NEW = "old\n" * 1000, "new\n" * 300_000


@contextmanager
def files_no_larger_than(size):
    """A real failing write: the kernel refuses to let a file grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("before", [None, OLD])
def test_a_write_leaves_the_new_text_and_nothing_else(tmp_path, before):
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    write_atomically(path, NEW)
    assert path.read_text() == NEW
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_utf8(tmp_path):
    write_atomically(tmp_path / "file.txt", "attn 3 · mlp 2")
    assert (tmp_path / "file.txt").read_bytes() == "attn 3 · mlp 2".encode()


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text(OLD)
    with files_no_larger_than(100_000), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        write_atomically(path, NEW)
    assert path.read_text() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file.txt", NEW)


WRITE_FOR_EVER = """
import pathlib, runpy, sys
write_atomically = runpy.run_path(sys.argv[1])["write_atomically"]  # without the seconds that torch takes to import
while True:
    for letter in "ab":
        write_atomically(pathlib.Path(sys.argv[2]), letter * 3_000_000)
        print(letter, flush=True)
"""


def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    """Kill the writer after some writes, as soon as it says so and so in the middle of the next."""
    path = tmp_path / "file.txt"
    path.write_text("a" * 3_000_000)
    command = [sys.executable, "-c", WRITE_FOR_EVER, layerskip.utils.__file__, path]
    for writes in range(10):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(1 + writes):
                assert writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        text = path.read_text()
        assert len(text) == 3_000_000
        assert set(text) in ({"a"}, {"b"})


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        write_atomically(pipe, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
