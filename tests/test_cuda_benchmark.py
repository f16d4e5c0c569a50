"""``python -m benchmarks.cuda``: every stage at toy size, with nothing but torch, transformers and numpy."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.cuda.__main__ import STAGES
from benchmarks.cuda.stages_decoding import GPU_TESTS

ROOT = Path(__file__).parent.parent

# Makes modules of these names impossible to import, in children too.
WITHOUT = """
import sys

class Missing:
    names = {"optuna", "sqlalchemy", "plotly", "pydantic", "gguf", "typer", "tenacity"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
"""


def run(out, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(textwrap.dedent(WITHOUT))
    command = [sys.executable, "-m", "benchmarks.cuda", "--out", str(out)]
    command += ["--device", "cpu", "--shape", "tiny", "--seconds", "200"]
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "LAYERSKIP_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    facts = [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]
    return done, facts


@pytest.mark.slow
def test_every_stage_runs_at_toy_size_without_the_search_s_libraries(tmp_path):
    done, facts = run(tmp_path / "out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [fact for fact in facts if fact["name"] == "error" or "error" in str(fact["value"])]
    assert {fact["stage"] for fact in facts if fact["name"] == "end"} == set(STAGES)
    named = {(fact["stage"], fact["name"]): fact["value"] for fact in facts}
    assert named["smoke", "failed checks"] == 0
    assert named["tests", "exit status"] == 0, named["tests", "summary"]
    assert named["plain", "fused sublayers"] == 8
    assert named["gemma-2", "fused sublayers"] == 8
    assert 0.5 < named["planted", "planted 0.95: skip γ 4: α"] <= 1
    lines = done.stdout.splitlines()
    assert 15 <= len(lines) <= 25
    assert any(line.startswith("planted") and "wanted ≥ 1.8" in line for line in lines)


def test_every_file_with_tests_for_a_device_is_run():
    tests = ROOT / "tests/layerskip"
    marked = {path for path in tests.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8")}
    assert {tests / f"{name}.py" for name in GPU_TESTS} == marked


def test_a_stage_that_fails_is_a_fact_and_the_next_one_runs(tmp_path):
    """The shape is not there, so that nothing of the model is; the facts of the machine are."""
    from benchmarks.cuda.child import run_stages

    out = tmp_path
    status = run_stages(out, "cpu", "none", {"plain": 10, "machine": 10}, float("inf"))
    facts = [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]
    assert status == 0
    assert [fact["stage"] for fact in facts if fact["name"] == "error"] == ["plain"]
    assert "KeyError" in (out / "tracebacks.txt").read_text()
