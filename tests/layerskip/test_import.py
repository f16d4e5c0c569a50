"""The package itself: its public names, and that importing it is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import layerskip


def test_importing_the_runtime_waits_for_no_library():
    code = "import sys, layerskip; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pydantic", "safetensors", "huggingface_hub"} & set(done.stdout.split())


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
