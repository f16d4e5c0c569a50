"""What CI runs."""

import subprocess
from pathlib import Path

RUN = Path(__file__).parents[1] / ".ci" / "run"


def test_arguments_are_refused_in_one_line():
    done = subprocess.run([RUN, "--only", "lint"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "--only lint" in line
