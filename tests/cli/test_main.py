"""The command itself: help, version, exit status, and how errors look."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from cli import main
from tests.cli.conftest import COMMAND, ENVIRONMENT


def commands(group, *before):
    """The words of every command."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *before, name)
        else:
            yield [*before, name]


COMMANDS = list(commands(get_command(main.app)))
HEAVY = ["torch", "optuna", "transformers", "plotly", "sqlalchemy", "scipy", "numpy"]
SHOW_IMPORTS = f"""
import json, sys
from cli import main
for arguments in json.loads(sys.argv[1]):
    status = main.run(arguments)
    print(" ".join(arguments), status, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def test_help_and_version_import_nothing_heavy():
    asked = [["--help"], ["--version"], *([*command, "--help"] for command in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", SHOW_IMPORTS, json.dumps(asked)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.splitlines() == [f"{' '.join(arguments)} 0 []" for arguments in asked]


def test_the_installed_command_answers_help(run_command):
    done = run_command("--help")
    assert (done.status, done.err) == (0, "")
    assert len(COMMANDS) >= 15
    assert all(command[0] in done.out for command in COMMANDS)


def test_a_reader_who_has_seen_enough_is_no_error():
    with subprocess.Popen([COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in (said := process.stderr.read())
        assert "Exception ignored" not in said


def test_what_the_terminal_has_no_characters_for_is_escaped(profile):
    def said(*arguments, **locale):
        done = subprocess.run([COMMAND, *arguments], capture_output=True, check=False, env=ENVIRONMENT | locale)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode("ascii")

    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert r"measured  1.25\xd7 (95 %: 1.15 to 1.35)" in said("profile", "show", profile, **c_locale)
    for locale in ({"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, c_locale):
        assert "Usage: " in said("apply", "--help", **locale)


def test_one_object_stays_one_where_the_terminal_has_no_characters_for_it(tmp_path):
    name = tmp_path / "größer.json"
    code = (
        "import sys; from cli.common import escape_unencodable, print_json; "
        "escape_unencodable(); print_json({'a': sys.argv[1]})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(name)],
        capture_output=True,
        check=True,
        env=ENVIRONMENT | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"},
    )
    assert json.loads(done.stdout.decode("ascii")) == {"a": str(name)}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_one_object_and_tracebacks(layerskip, command):
    done = layerskip(*command, "--help")
    assert (done.status, done.err) == (0, "")
    assert "Usage: " in done.out
    assert "--json" in done.out
    assert "--debug" in done.out


def test_the_page_of_commands_names_every_command():
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[?`([^`]*)`", page, re.MULTILINE)
    words = [re.findall(r"[a-z]+", re.sub(r"--to|[A-Z_/\[\]]+", " ", one)) for one in named]
    pairs = [word if len(word) == 1 else [word[0], other] for word in words for other in word[1:] or [None]]
    assert sorted(pairs) == sorted(COMMANDS)


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
    assert done.error == (
        "missing.json: cannot read the draft profile: No such file or directory; 'layerskip search MODEL' makes one"
    )

    shown = layerskip("profile", "show", "missing.json", "--debug")
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.startswith("Traceback (most recent call last):")
    assert "layerskip/profile.py" in shown.err
    assert shown.err.endswith(done.err)

    assert layerskip("profile", "show", "missing.json").err == done.err
