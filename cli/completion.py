"""Completion functions for the shell. None of them imports torch, which takes longer than anybody waits for a key."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import typer

import layerskip
from layerskip.names import ALIASES

DEFAULT_STORAGE = "sqlite:///layerskip.db"
STORAGE_VARIABLE = "LAYERSKIP_STORAGE"

Completer = Callable[[str], list[str]]


def one_of(*values: str) -> Completer:
    """A completion function for an option that accepts these values."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(values, incomplete)

    return complete


def models(incomplete: str) -> list[str]:
    """Complete models: aliases, folders and .gguf files."""
    return _beginning(tuple(ALIASES), incomplete) + _paths(incomplete, ".gguf")


def profiles(incomplete: str) -> list[str]:
    """Complete profiles: names of ready ones, folders and .json files."""
    return _beginning(_ready_names(), incomplete) + _paths(incomplete, ".json")


def usual_storage() -> str:
    """The storage of commands without ``--storage``."""
    return os.environ.get(STORAGE_VARIABLE, DEFAULT_STORAGE)


def studies(context: typer.Context, incomplete: str) -> list[str]:
    """Complete names of studies in the database that the command line or the environment names, if it is SQLite."""
    given = context.params.get("storage")
    url = given if isinstance(given, str) else usual_storage()
    file = Path(url.removeprefix("sqlite:///"))
    if not url.startswith("sqlite:///") or not file.is_file():
        return []
    try:
        with sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=1) as database:
            rows = database.execute("SELECT study_name FROM studies ORDER BY study_name").fetchall()
    except sqlite3.Error:  # not a database of studies, or locked
        return []
    return _beginning([name for (name,) in rows], incomplete)


def _ready_names() -> list[str]:
    """Names in the index of ready profiles, read without layerskip's own reader, which imports torch."""
    try:
        index = json.loads((Path(layerskip.__file__).parent / "profiles" / "index.json").read_bytes())
        return sorted({entry["name"] for entry in index["profiles"]})
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _beginning(values: list[str] | tuple[str, ...], incomplete: str) -> list[str]:
    return [value for value in values if value.startswith(incomplete)]


def _paths(incomplete: str, suffix: str) -> list[str]:
    """Folders, with a slash at the end, and files with a suffix."""
    folder, _, beginning = incomplete.rpartition("/")
    try:
        entries = sorted(os.scandir(f"{folder}/" if "/" in incomplete else "."), key=lambda entry: entry.name)
    except OSError:
        return []
    before = incomplete[: len(incomplete) - len(beginning)]
    matching = [entry for entry in entries if entry.name.startswith(beginning) and not entry.name.startswith(".")]
    folders = [f"{before}{entry.name}/" for entry in matching if entry.is_dir()]
    return folders + [f"{before}{entry.name}" for entry in matching if entry.name.endswith(suffix)]
