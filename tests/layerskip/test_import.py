"""What importing the runtime costs other people's programs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import layerskip


def modules_after(statement):
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


NOT_FOR_THE_RUNTIME = {"optuna", "plotly", "typer", "sqlalchemy", "search", "studies", "cli"}


def test_importing_the_runtime_waits_for_no_library():
    assert not modules_after("import layerskip") & {"torch", "transformers", "pydantic", *NOT_FOR_THE_RUNTIME}


def test_the_runtime_brings_neither_search_nor_its_libraries():
    loaded = modules_after("from layerskip import *")
    assert {"layerskip", "torch", "transformers"} <= loaded
    assert not loaded & NOT_FOR_THE_RUNTIME


def test_type_checkers_see_the_names_that_there_are():
    """Written down twice: once for the program, once for whoever reads it."""
    tree = ast.parse(Path(layerskip.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.asname: node.module.removeprefix("layerskip.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert seen == layerskip._MODULES


def test_every_public_name_is_found_and_no_other():
    for name in layerskip.__all__:
        assert getattr(layerskip, name).__name__ == name
        assert name in dir(layerskip)
    with pytest.raises(AttributeError, match="module 'layerskip' has no attribute 'Generaton'"):
        layerskip.Generaton  # noqa: B018
