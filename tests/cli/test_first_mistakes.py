"""What a new user does wrong first, and the one line that each mistake gets."""

import re
import subprocess
import sys

import pytest
import torch

from layerskip import DraftProfile, LayerSkipModel, load_checkpoint
from layerskip.fingerprint import identify
from tests.cli.conftest import ENVIRONMENT, save_model

ONLINE = {name: value for name, value in ENVIRONMENT.items() if name != "HF_HUB_OFFLINE"}
NOWHERE = "http://127.0.0.1:9"  # the port of the discard protocol, where nobody listens


@pytest.fixture
def never_loads(monkeypatch):
    """No model may be loaded: the mistake can be seen before."""

    def load(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("layerskip.checkpoints.AutoModelForCausalLM.from_pretrained", load)


# A misspelled name.


def test_a_misspelled_alias_is_told_the_right_one(layerskip):
    done = layerskip("search", "smollm")
    assert done.status == 1
    assert done.err.splitlines()[-1] == (
        "layerskip: model 'smollm': not an alias (smollm2), not a local file or folder, and not found on the Hub "
        "(HF_HUB_OFFLINE is set); did you mean 'smollm2'?"
    )


def test_a_misspelled_hub_id_is_told_one_that_looks_alike(layerskip):
    done = layerskip("search", "HuggingFaceTB/SmolLM2-135M-Instruc")
    assert done.err.splitlines()[-1].endswith("; did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'?")


@pytest.mark.parametrize(("wrong", "right"), [("./Tinny", "Tiny"), ("modle.gguf", "model.gguf")])
def test_a_misspelled_folder_or_file_is_told_what_lies_beside_it(layerskip, elsewhere, wrong, right):
    save_model(elsewhere / "Tiny", seed=0)
    (elsewhere / "model.gguf").write_text("")
    (elsewhere / "Tinny.txt").write_text("")  # no model
    done = layerskip("search", wrong)
    assert done.status == 1
    assert done.err.splitlines()[-1].endswith(f"; did you mean '{right}'?")


def test_a_misspelled_profile_is_told_which_there_are(layerskip, monkeypatch, tmp_path, profile):
    from benchmarks.add_profile import add_profile
    from layerskip import ready_profiles

    monkeypatch.setattr(ready_profiles, "FOLDER", tmp_path)
    (tmp_path / "index.json").write_text(ready_profiles.ProfileIndex().model_dump_json())
    add_profile("smollm2", profile, "cpu")
    done = layerskip("apply", "smolm2", "hello")
    assert done.status == 1
    assert done.error == (
        "profile 'smolm2': no such file, and no ready profile of that name (there are: smollm2); "
        "did you mean 'smollm2'?"
    )


def test_a_model_given_as_a_profile_is_told_to_be_searched(layerskip, model_folder):
    done = layerskip("apply", model_folder, "hello")
    assert done.error.endswith(f"is a model, and not a draft profile; make one with 'layerskip search {model_folder}'")


# A device or an engine that is not there.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    "command",
    [
        ["apply", "{profile}", "hello", "--device", "cuda"],
        ["bench", "{profile}", "--device", "cuda:1"],
        ["search", "{model}", "--device", "cuda"],
        ["search", "{model}", "--devices", "cpu,cuda:7"],
        ["profile", "check", "{profile}", "--model", "{model}", "--device", "cuda"],
    ],
    ids=lambda command: " ".join(command),
)
def test_without_a_gpu_its_device_is_refused_before_anything_is_loaded(
    layerskip, profile, model_folder, elsewhere, never_loads, command
):
    done = layerskip(*(word.format(profile=profile, model=model_folder) for word in command))
    assert done.status == 2
    assert re.fullmatch(r"device 'cuda(:\d)?' is not available: .*use cpu", done.error)
    assert list(elsewhere.iterdir()) == []  # nor was a database made


def test_a_gpu_that_is_one_too_many_is_told_the_last(layerskip, profile, monkeypatch, never_loads):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    done = layerskip("apply", profile, "hello", "--device", "cuda:7")
    assert (done.status, done.error) == (2, "device 'cuda:7' is not available: the last GPU here is cuda:1")


def test_a_gpu_without_a_driver_is_told_apart_from_a_build_without_cuda(layerskip, profile, monkeypatch, never_loads):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = layerskip("apply", profile, "hello", "--device", "cuda")
    assert "no GPU with a working driver was found" in done.error


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ("eagre", "engine 'eagre' is unknown; expected auto, eager, packed or cuda-graphs; did you mean 'eager'?"),
        ("steam", "engine 'steam' is unknown; expected auto, eager, packed or cuda-graphs"),
        (
            "cuda-graphs",
            "engine 'cuda-graphs': CUDA graphs need the whole model on one CUDA device; use the eager engine",
        ),
    ],
)
@pytest.mark.parametrize("command", ["apply", "bench", "search", "doctor"])
def test_an_engine_that_cannot_be_had_is_refused_before_anything_is_loaded(
    layerskip, profile, model_folder, never_loads, command, engine, line
):
    target = [model_folder] if command in ("search", "doctor") else [profile]
    prompt = ["hello"] if command == "apply" else []
    done = layerskip(command, *target, *prompt, "--engine", engine, "--device", "cpu")
    assert done.status == 2
    assert done.err.splitlines()[-1] == f"layerskip: {line}"


# Out of memory.


def test_out_of_memory_says_what_to_lower(profile, tmp_path):
    """Keys and values of 64 KB a token grow with the text, in a process that may have 128 MB more than it has."""
    wide = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 512}
    folder = save_model(tmp_path / "Long", seed=0, max_position_embeddings=10_000_000, **wide)
    model = LayerSkipModel(load_checkpoint(str(folder), device="cpu", dtype="float32").model)
    long = DraftProfile.load(profile).model_copy(update={"model": identify(model, str(folder))})
    long.save(tmp_path / "long.json")
    code = """
import re, resource, sys
from pathlib import Path
from cli import main
assert main.run(["apply", sys.argv[1], "hello", "--max-new-tokens", "2"]) == 0  # all libraries are loaded
[now] = re.findall(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
resource.setrlimit(resource.RLIMIT_AS, (int(now) * 1024 + 2**27,) * 2)
sys.exit(main.run(["apply", sys.argv[1], "hello", "--max-new-tokens", "9000000"]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "long.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.match(r"layerskip: out of memory in main memory \(wanted .* more\): lower --max-new-tokens, ", last), last
    assert "Traceback" not in done.stderr


# The wrong profile, and a prompt that is too long.


@pytest.mark.parametrize("command", ["apply", "bench"])
def test_a_profile_for_another_model_says_for_which(layerskip, profile, model_folder, narrow_model_folder, command):
    prompt = ["hello"] if command == "apply" else []
    done = layerskip(command, profile, *prompt, "--model", narrow_model_folder)
    assert done.status == 1
    assert done.error == (
        f"{profile}: model.intermediate_size: the profile is for 48 ({model_folder}), but this model has 16; "
        "search this model for a profile of its own"
    )


def test_of_many_prompts_one_that_is_too_long_is_named_before_any_is_decoded(layerskip, profile, elsewhere):
    (elsewhere / "prompts.txt").write_text("short\n" + "x" * 600 + "\n")
    done = layerskip("apply", profile, "--prompts", "prompts.txt")
    assert done.status == 2
    assert re.fullmatch(r"prompt 2: \d+ tokens do not fit the model's context of 512; shorten it", done.error)


# No network.


@pytest.fixture
def online(tmp_path):
    """Run the installed command with a hub at some address, and nothing in its cache."""

    def run(endpoint, *arguments):
        env = ONLINE | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub")}
        command = [sys.executable, "-c", "import sys; from cli.main import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=100)

    return run


def test_without_a_network_a_hub_id_fails_at_once_and_says_why(online):
    done = online(NOWHERE, "search", "someone/some-model")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "layerskip: model 'someone/some-model': not an alias (smollm2), not a local file or folder, and not found "
        f"on the Hub: {NOWHERE} cannot be reached ("
    )
    assert last.endswith("): is there a network?")
    assert "Retrying" not in done.stderr


def test_a_hub_that_knows_no_such_model_says_so(layerskip, hub):
    done = layerskip("search", "someone/some-model")
    assert done.status == 1
    last = done.err.splitlines()[-1]
    assert "not found on the Hub: someone/some-model is not a local folder and is not a valid model" in last
    assert "is there a network" not in last


# A forgotten argument.


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search", "no model given; give a Hub id, a folder, a .gguf file, or smollm2 to try it on a small model"),
        ("apply", "no profile given; give the file or folder of a draft profile, or a ready one, such as smollm2"),
        ("report", "no study given; give its name; 'layerskip studies list' has the names"),
    ],
)
def test_a_command_without_its_argument_says_what_to_give(layerskip, never_loads, command, message):
    done = layerskip(command)
    assert done.status == 2
    assert done.err == f"layerskip: {message} (see --help)\n"
