"""Imports run one way: cli → search → studies → layerskip."""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# From the top down; each may import itself and what stands behind it.
PACKAGES = ["cli", "search", "studies", "layerskip"]
NOT_FOR_THE_RUNTIME = {"optuna", "optuna_dashboard", "plotly", "typer", "rich", "sqlalchemy", "scipy"}


def modules(package):
    found = sorted((REPOSITORY / package).rglob("*.py"))
    assert found, f"no modules in {package}"
    return found


def imported(module):
    """The top-level packages that a module imports anywhere in it, and the lines where it does."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            yield node.module.partition(".")[0], node.lineno


def imports_of(package, names):
    """Where a package imports one of some names, as ``file:line name``."""
    return [
        f"{module.relative_to(REPOSITORY)}:{line} {name}"
        for module in modules(package)
        for name, line in imported(module)
        if name in names
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_one_above_it(package):
    assert imports_of(package, PACKAGES[: PACKAGES.index(package)]) == []


@pytest.mark.parametrize(("package", "below"), [("cli", "search"), ("search", "studies"), ("studies", "layerskip")])
def test_each_package_stands_on_the_next(package, below):
    assert imports_of(package, {below})


def test_the_runtime_imports_nothing_that_only_searching_needs():
    assert imports_of("layerskip", NOT_FOR_THE_RUNTIME) == []


def test_no_product_code_imports_the_tests():
    assert [found for package in PACKAGES for found in imports_of(package, {"tests", "pytest", "hypothesis"})] == []


def test_the_runtime_imports_only_what_it_depends_on():
    allowed = {
        *sys.stdlib_module_names,
        "layerskip",
        "torch",
        "transformers",
        "pydantic",
        "pydantic_core",
        "safetensors",
        "huggingface_hub",
    }
    every = {name for module in modules("layerskip") for name, _ in imported(module)}
    assert every <= allowed
