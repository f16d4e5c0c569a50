"""A tiny model on disk with a tokenizer and a chat template, profiles for it, and two ways to run the command."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from cli import main
from layerskip import DraftProfile, FixedLength, LayerSkipModel, SkipSet, load_checkpoint
from layerskip.fingerprint import identify
from layerskip.profile import Measured, Provenance
from tests.models import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

COMMAND = Path(sys.executable).with_name("layerskip")
# As on a user's machine, where stdout to a pipe is buffered; and with one thread, so that another process measures on
# what this one calls the same device.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {
    "OMP_NUM_THREADS": "1"
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models are no faster with several threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """References, locks and costs are kept where no user keeps any, and measured once for all tests."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LAYERSKIP_CACHE", str(folder))
        patched.setitem(ENVIRONMENT, "LAYERSKIP_CACHE", str(folder))
        yield


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every command runs in an empty folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LAYERSKIP_STORAGE", raising=False)
    return folder


def save_model(folder, seed, **settings):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tiny_llama(**{"vocab_size": 320, "max_position_embeddings": 512, "seed": seed} | settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "Tiny", seed=0)


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory):
    """The same architecture with other weights."""
    return save_model(tmp_path_factory.mktemp("models") / "Other", seed=1)


@pytest.fixture(scope="session")
def narrow_model_folder(tmp_path_factory):
    """Another architecture."""
    return save_model(tmp_path_factory.mktemp("models") / "Narrow", seed=0, intermediate_size=16)


@pytest.fixture(scope="session")
def checkpoint(model_folder):
    return load_checkpoint(str(model_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def wrapped(checkpoint):
    return LayerSkipModel(checkpoint.model)


@pytest.fixture
def make_profile(wrapped, model_folder, tmp_path):
    """Save a profile of the tiny model that measured some speedup (None: was never measured)."""

    def make(speedup, *, model=None, name="profile.json"):
        measured = speedup and Measured(
            speedup=speedup,
            speedup_low=speedup - 0.1,
            speedup_high=speedup + 0.1,
            acceptance_rate=0.75,
            plain_tokens_per_second=100.0,
            speculative_tokens_per_second=100.0 * speedup,
            prompts=8,
            prompt_set="held-out",
            max_new_tokens=48,
            near_ties=0,
            device="a processor",
            dtype="float32",
            versions={"torch": "2.13.0"},
        )
        profile = DraftProfile(
            model=identify(wrapped, str(model or model_folder)),
            skip_set=SkipSet(4, attention=(1,), mlp=(2,)),
            stopping=FixedLength(3),
            measured=measured,
            provenance=Provenance(
                study="s" if speedup else None,
                trial=7 if speedup else None,
                created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
                tool="layerskip 0.1.0",
            ),
        )
        profile.save(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def profile(make_profile):
    """The path of a profile that pays."""
    return make_profile(1.25)


@pytest.fixture
def suite(tmp_path):
    """A suite of three categories, one of them of conversations."""
    rows = [
        {"question_id": 10 * kind + number, "category": name, "turns": [f"Ask {number}", "And then?"][:turns]}
        for kind, (name, turns) in enumerate([("writing", 2), ("qa", 1), ("rag", 1)])
        for number in range(3)
    ]
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class CommandResult:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def object(self):
        """The one JSON object that is all of stdout."""
        [line] = self.out.splitlines()
        value = json.loads(line)
        assert isinstance(value, dict)
        return value

    @property
    def error(self):
        """The one line that is all of stderr, after the program's name; nothing was printed to stdout."""
        assert self.out == ""
        [line] = self.err.splitlines()
        assert line.startswith("layerskip: ")
        return line.removeprefix("layerskip: ")


@pytest.fixture
def layerskip(capsys):
    """Run a command in this process."""

    def run(*arguments):
        capsys.readouterr()
        status = main.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return CommandResult(status, captured.out, captured.err)

    return run


@pytest.fixture
def run_command():
    """Run the installed console script."""

    def run(*arguments, **options):
        command = [str(argument) for argument in (COMMAND, *arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120, **options
        )
        return CommandResult(done.returncode, done.stdout, done.stderr)

    return run
