"""Whatever a user types ends in a result or in one line, and never in an unexpected error: odd inputs, generated."""

import os
import random
import sys

import click
import pytest
import typer

from cli import main

COMMAND = typer.main.get_command(main.app)
# Ended by nothing but Ctrl-C, or asking a service that is not there for minutes.
NOT_TRIED = {("dashboard",), ("profile", "push")}
# How long a command may work does not depend on these, so that none takes long.
QUICK = {
    "search": ("--trials", "2", "--max-new-tokens", "4", "--prompts-per-trial", "1", "--finalists", "1"),
    "tune": ("--positions", "200", "--epochs", "1", "--minutes", "0.01"),
    "bench": ("--max-new-tokens", "2"),
    "compare": ("--max-new-tokens", "2"),
    "apply": ("--max-new-tokens", "2"),
}
NUMBERS = ("-1", "0", "1", "nan", "inf", "1e400", "99999999999999999999", "1.5", "", "x", "٣", "0x10")
TEXTS = ("", " ", "a\nb", "\x00", "a\udce9", "-", "--", "😀" * 40, "a" * 5000, "/", "../..", "~", "*", "%s{}", "'\"")
FILES = (
    "folder",
    "empty",
    "binary",
    "null",
    "deep",
    "list",
    "latin",
    "folder.gguf",
    "file.gguf",
    "bom.jsonl",
    "missing",
)
URLS = (
    "sqlite://",
    "sqlite:///",
    "sqlite:////proc/x.db",
    "sqlite:///folder",
    "postgresql://",
    "mysql://x",
    "http://[",
    "x:",
)


def commands(group=COMMAND, path=()):
    """Every command, by its path."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif (*path, name) not in NOT_TRIED:
            yield (*path, name), command


@pytest.fixture
def odd_files(elsewhere):
    """Files that nobody would give a command on purpose."""
    (elsewhere / "folder").mkdir()
    (elsewhere / "folder.gguf").mkdir()
    contents = {
        "empty": b"",
        "binary": bytes(range(256)) * 8,
        "null": b"null",
        "deep": b"[" * 100_000,
        "list": b'[{"format": "layerskip-profile"}]',
        "latin": "größer\r\n".encode("latin-1"),
        "file.gguf": b"GGUF\x03\x00\x00\x00" + b"\xff" * 64,
        "bom.jsonl": '\ufeff{"prompt": "Hello"}\n'.encode(),
    }
    for name, content in contents.items():
        (elsewhere / name).write_bytes(content)
    return elsewhere


def odd_calls(path, command, model, profile):
    """Calls of a command with one odd value each, the other arguments being usual ones."""
    usual = {"model": str(model), "source": str(model), "profile": str(profile), "prompt": "Hello", "study": "none"}
    arguments = [
        parameter
        for parameter in command.params
        if isinstance(parameter, click.Argument) or not parameter.opts[0].startswith("-")
    ]
    given = [usual.get(argument.name, "x") for argument in arguments]
    quick = QUICK.get(path[-1], ())
    for place in range(len(given)):
        for odd in (*TEXTS, *FILES, *URLS):
            yield [*path, *quick, "--", *given[:place], odd, *given[place + 1 :]]
    for option in command.params:
        name = option.opts[0]
        if option in arguments or name in ("--help", "--install-completion", "--show-completion") or option.is_flag:
            continue
        for odd in (*NUMBERS, *TEXTS[:9], *FILES, *URLS[:4]):
            yield [*path, *quick, f"{name}={odd}", "--", *given]
        yield [*path, *quick, name]


def tried(arguments, capfd):
    """The exit status of a call, and what it said on stderr."""
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    try:
        status = main.run(arguments)
    finally:
        sys.stdin.close()
        sys.stdin = sys.__stdin__
    return status, capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_odd_inputs_end_in_a_result_or_in_one_line(path, command, model_folder, profile, odd_files, capfd):
    calls = list(odd_calls(path, command, model_folder, profile))
    count = int(os.environ.get("LAYERSKIP_ODD_INPUTS", "25"))
    for arguments in random.Random(" ".join(path)).sample(calls, min(count, len(calls))):
        status, errors = tried(arguments, capfd)
        shown = [one[:60] for one in arguments]
        assert status in (0, 1, 2), (shown, errors[-500:])
        assert "unexpected " not in errors, (shown, errors[-500:])
        assert "Traceback" not in errors, (shown, errors[-500:])
        if status:
            lines = [line for line in errors.splitlines() if line.startswith("layerskip: ")]
            assert len(lines) == 1, (shown, errors[-500:])
            assert len(lines[0]) < 1000, (shown, len(lines[0]))


def test_every_option_is_among_those_that_are_tried(model_folder, profile):
    """The calls name each option that takes a value."""
    for path, command in commands():
        named = {
            argument.partition("=")[0] for call in odd_calls(path, command, model_folder, profile) for argument in call
        }
        options = [p for p in command.params if p.opts[0].startswith("-") and not p.is_flag]
        assert {p.opts[0] for p in options} <= named, path
