"""What the shell is offered to complete, and that it comes without a wait for torch."""

import json
import subprocess
import sys

import optuna
import pytest

from cli import completion
from layerskip.checkpoints import resolve_device, resolve_dtype
from layerskip.engine import EagerEngine, GraphEngine, PackedEngine
from layerskip.names import ALIASES
from layerskip.ready_profiles import ready_profiles
from search.settings import SearchSettings
from studies.storage import open_storage
from tests.cli.conftest import COMMAND, ENVIRONMENT


def completed(line, shell="bash", **environment):
    """What the installed command offers after the last word of a command line."""
    words = line.split(" ")
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    env = ENVIRONMENT | asked | {"_LAYERSKIP_COMPLETE": f"complete_{shell}"} | environment
    done = subprocess.run([COMMAND], capture_output=True, text=True, check=False, env=env, timeout=60)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_completed_in_every_shell(shell):
    offered = completed("layerskip do", shell)
    assert "doctor" in offered
    assert "search" not in offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_each_shell_calls_the_command(shell):
    env = ENVIRONMENT | {"_LAYERSKIP_COMPLETE": f"source_{shell}"}
    done = subprocess.run([COMMAND], capture_output=True, text=True, check=True, env=env, timeout=60)
    assert f"_LAYERSKIP_COMPLETE=complete_{shell}" in done.stdout
    assert "layerskip" in done.stdout


def test_profiles_are_completed_by_file_and_by_name(elsewhere, monkeypatch):
    for name in ("tiny.json", "tiny.txt", ".tiny.json"):
        (elsewhere / name).write_text("")
    (elsewhere / "tinker").mkdir()
    monkeypatch.setattr(completion, "_ready_names", lambda: ["tinyllama", "smollm2"])
    assert completion.profiles("ti") == ["tinyllama", "tinker/", "tiny.json"]
    (elsewhere / "tinker" / "inner.json").write_text("")
    assert completion.profiles("tinker/") == ["tinker/inner.json"]
    assert completion.profiles("nowhere/x") == []
    assert completed("layerskip apply tiny").split() == ["tiny.json"]


def test_names_of_ready_profiles_are_those_of_the_index():
    assert completion._ready_names() == sorted({entry.name for entry in ready_profiles()})


def test_models_are_completed_by_alias_folder_and_gguf_file(elsewhere):
    (elsewhere / "small").mkdir()
    (elsewhere / "smart.gguf").write_text("")
    assert completion.models("sm") == [*ALIASES, "small/", "smart.gguf"]


def test_studies_are_completed_from_the_storage_that_is_named(tmp_path):
    for file, name in (("layerskip.db", "usual"), ("other.db", "unusual")):
        optuna.create_study(study_name=name, storage=open_storage(f"sqlite:///{file}"))
    assert completed("layerskip studies show ").split() == ["usual"]
    assert completed("layerskip studies show --storage sqlite:///other.db u").split() == ["unusual"]
    assert completed("layerskip report ").split() == ["usual"]
    assert completed("layerskip search --storage sqlite:///other.db --study ").split() == ["unusual"]
    assert completed("layerskip studies show ", LAYERSKIP_STORAGE="sqlite:///other.db").split() == ["unusual"]


@pytest.mark.parametrize("url", ["sqlite:///missing.db", "postgresql://host/db", "sqlite:///broken.db", "nonsense"])
def test_no_study_is_offered_where_none_can_be_looked_up_and_no_file_is_made(elsewhere, url):
    (elsewhere / "broken.db").write_text("not a database")
    assert completed("layerskip studies show ", LAYERSKIP_STORAGE=url).split() == []
    assert [path.name for path in elsewhere.iterdir()] == ["broken.db"]


def test_values_of_options_are_completed():
    assert completed("layerskip search --sampler g").split() == ["greybox"]
    assert completed("layerskip apply p.json --dtype b").split() == ["bfloat16"]
    assert completed("layerskip export p.json --dtype f").split() == ["float32", "float16"]
    assert completed("layerskip bench p.json --engine ").split() == ["auto", "eager", "packed", "cuda-graphs"]


def test_every_value_that_is_offered_is_accepted():
    for sampler in completed("layerskip search --sampler ").split():
        SearchSettings(sampler=sampler)
    cpu = resolve_device("auto")
    for dtype in completed("layerskip apply p.json --dtype ").split():
        resolve_dtype(dtype, cpu)
    assert completed("layerskip apply p.json --device c").split() == ["cpu", "cuda"]
    engines = [EagerEngine.name, PackedEngine.name, GraphEngine.name]
    assert completed("layerskip bench p.json --engine ").split() == ["auto", *engines]


def test_nothing_heavy_is_imported_to_complete():
    code = """
import json, sys
from cli import main, completion
completion.profiles(""), completion.models(""), completion.one_of("a")("")
print(json.dumps([name for name in ("torch", "optuna", "transformers") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == []
