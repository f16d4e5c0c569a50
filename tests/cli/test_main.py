"""The command itself: help, version, exit status, and how errors look."""

import subprocess
import sys

import pytest

from tests.cli.conftest import COMMAND

HEAVY = ["torch", "optuna", "transformers", "plotly", "sqlalchemy", "scipy", "numpy"]
COMMANDS = ["search", "apply", "bench", "profile", "studies", "dashboard", "doctor"]
SHOW_IMPORTS = f"""
import sys
from cli import main
status = main.run(sys.argv[1:])
print(status, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("search", "apply", "bench", "profile", "studies", "dashboard", "doctor")),
    ],
    ids=" ".join,
)
def test_help_and_version_import_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", SHOW_IMPORTS, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "0 []\n"
    assert done.stdout


def test_the_installed_command_answers_help(run_command):
    done = run_command("--help")
    assert (done.status, done.err) == (0, "")
    assert all(name in done.out for name in COMMANDS)


def test_a_reader_who_has_seen_enough_is_no_error():
    with subprocess.Popen([COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in (said := process.stderr.read())
        assert "Exception ignored" not in said


@pytest.mark.parametrize(
    "command",
    [
        "",
        "search",
        "apply",
        "profile show",
        "profile check",
        "profile diff",
        "profile list",
        "bench",
        "doctor",
        "studies list",
        "dashboard",
    ],
)
def test_every_command_has_help(layerskip, command):
    done = layerskip(*command.split(), "--help")
    assert (done.status, done.err) == (0, "")
    assert "Usage: " in done.out
    if command:
        assert "--json" in done.out
        assert "--debug" in done.out


def test_the_version_is_that_of_the_package(layerskip):
    import layerskip as package

    done = layerskip("--version")
    assert (done.status, done.out, done.err) == (0, f"layerskip {package.__version__}\n", "")


@pytest.mark.parametrize("command", ["", "profile", "studies"])
def test_a_group_without_a_command_is_wrong_usage_and_shows_its_help_alone(layerskip, command):
    done = layerskip(*command.split())
    assert done.status == 2
    assert (done.out + done.err).count("Usage: ") == 1
    assert "layerskip: " not in done.err


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("bogus", "bogus"),
        ("profile bogus", "bogus"),
        ("--bogus", "--bogus"),
        ("search --bogus", "--bogus"),
        ("apply", "profile"),
        ("profile show", "profile"),
        ("studies show", "study"),
        ("search --trials many", "--trials"),
        ("search --seed x", "--seed"),
        ("apply p.json --max-new-tokens few", "--max-new-tokens"),
        ("apply p.json --temperature hot", "--temperature"),
        ("studies show s --best 0", "--best"),
        ("dashboard --port 0", "--port"),
        ("dashboard --port 70000", "--port"),
    ],
)
def test_wrong_usage_is_one_line_that_names_what_is_wrong(layerskip, command, named):
    done = layerskip(*command.split())
    assert done.status == 2
    assert named in done.error.lower()
    assert done.error.endswith("(see --help)")


def test_a_failure_is_one_line_and_its_traceback_is_shown_on_request(layerskip):
    done = layerskip("profile", "show", "missing.json")
    assert done.status == 1
    assert done.error == "missing.json: cannot read the draft profile: No such file or directory"

    shown = layerskip("profile", "show", "missing.json", "--debug")
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.startswith("Traceback (most recent call last):")
    assert "layerskip/profile.py" in shown.err
    assert shown.err.endswith(done.err)

    assert layerskip("profile", "show", "missing.json").err == done.err
