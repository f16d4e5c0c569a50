"""House rules that no single file shows: the direction of imports, no circles, unique file names, no heavy imports."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# From the top down; each may import itself and those after it.
PACKAGES = ["cli", "search", "studies", "layerskip"]
NOT_FOR_THE_RUNTIME = {"optuna", "optuna_dashboard", "plotly", "typer", "rich", "sqlalchemy", "scipy"}
OPTIONAL = {"gguf"}  # the extra of that name, imported where a GGUF file is read
RUNTIME_DEPENDENCIES = {"torch", "transformers", "huggingface_hub", "pydantic", "pydantic_core", "safetensors"}


@cache
def sources():
    """The file and syntax tree of every product module by its dotted name; a package stands for its ``__init__``."""
    found = {}
    for package in PACKAGES:
        files = sorted((REPOSITORY / package).rglob("*.py"))
        assert files, f"no modules in {package}"
        for file in files:
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = file, ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports_in(tree):
    """The names that a module imports anywhere in it, with the lines: in functions and for type checkers, too.

    ``from a import b`` gives both ``a`` and ``a.b``, which may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def top(name):
    return name.partition(".")[0]


def imports_of(package, names):
    """Where a package imports one of some top-level packages, as ``file:line name``."""
    return sorted(
        {
            f"{file.relative_to(REPOSITORY)}:{line} {top(imported)}"
            for module, (file, tree) in sources().items()
            if top(module) == package
            for imported, line in imports_in(tree)
            if top(imported) in names
        }
    )


def import_graph():
    """The product modules that each one imports; ``from package import module`` imports the module alone."""
    graph = {}
    for module, (_, tree) in sources().items():
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & sources().keys()
                imported |= submodules
                if len(submodules) < len(node.names):
                    imported.add(node.module)
        graph[module] = (imported & sources().keys()) - {module}
    return graph


def reachable(graph, module):
    found, todo = set(), [module]
    while todo:
        for imported in graph[todo.pop()] - found:
            found.add(imported)
            todo.append(imported)
    return found


def circles(graph):
    """The largest sets of modules that import each other, directly or through others."""
    reach = {module: reachable(graph, module) for module in graph}
    return {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_one_above_it(package):
    assert imports_of(package, PACKAGES[: PACKAGES.index(package)]) == []


@pytest.mark.parametrize(("package", "below"), [("cli", "search"), ("search", "studies"), ("studies", "layerskip")])
def test_each_package_uses_the_next(package, below):
    assert imports_of(package, {below})


def test_modules_that_import_each_other_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert circles(graph) == {frozenset("abc"), frozenset("de")}


def test_no_modules_import_each_other():
    assert list(map(sorted, circles(import_graph()))) == []


def test_no_file_name_occurs_twice_in_the_product():
    names = Counter(file.name for file, _ in sources().values())
    twice = {name for name, count in names.items() if count > 1} - {"__init__.py"}
    assert twice == set()


def test_the_runtime_imports_nothing_that_only_searching_needs():
    assert imports_of("layerskip", NOT_FOR_THE_RUNTIME) == []


def test_the_runtime_imports_only_what_it_depends_on():
    trees = [tree for module, (_, tree) in sources().items() if top(module) == "layerskip"]
    every = {top(name) for tree in trees for name, _ in imports_in(tree)}
    assert every <= {*sys.stdlib_module_names, "layerskip"} | RUNTIME_DEPENDENCIES | OPTIONAL


def test_no_product_code_imports_the_tests():
    assert [found for package in PACKAGES for found in imports_of(package, {"tests", "pytest", "hypothesis"})] == []


def test_a_script_in_the_folder_that_holds_the_clone_finds_the_package(tmp_path):
    (tmp_path / "layerskip").mkdir()  # as a clone is, a folder of the package's name that is no package
    done = subprocess.run(
        [sys.executable, "-c", "import layerskip; print(layerskip.__file__)"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert Path(done.stdout.strip()) == REPOSITORY / "layerskip" / "__init__.py"


def test_importing_the_runtime_loads_neither_search_nor_its_libraries():
    code = """
import sys, layerskip
for name in layerskip.__all__:
    getattr(layerskip, name)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {top(name) for name in done.stdout.split()}
    assert {"layerskip", "torch", "transformers"} <= loaded
    assert not loaded & {"optuna", "plotly", "typer", "sqlalchemy", "search", "studies", "cli"}
