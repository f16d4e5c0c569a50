"""What importing the runtime costs other people's programs."""

import subprocess
import sys


def modules_after(statement):
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_runtime_brings_neither_search_nor_its_libraries():
    loaded = modules_after("import layerskip")
    assert {"layerskip", "torch", "transformers"} <= loaded
    assert not loaded & {"optuna", "plotly", "typer", "sqlalchemy", "search", "studies", "cli"}
