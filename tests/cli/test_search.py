"""``layerskip search``, from the command to the profile."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from cli import search_command
from cli.common import RunOptions
from layerskip import DraftProfile, LayerSkipModel, SkipSet, load_checkpoint
from layerskip.drafting.weights import DraftWeights
from search.search_result import SearchResult
from studies.ranking import completed_trials, evaluated_trials, measured_trials
from studies.storage import open_storage
from studies.study import load_study
from tests.cli.conftest import COMMAND, ENVIRONMENT
from tests.models import random_heads
from tests.trained import bridge_profile, layer_profile, profile_with

STORAGE = "sqlite:///layerskip.db"


@pytest.fixture
def prompts(elsewhere):
    """Five prompts in a file: four to search with, one held out."""
    file = elsewhere / "prompts.txt"
    file.write_text("one\ntwo\nthree\nfour\nfive\n")
    return file


@pytest.fixture
def options(model_folder, prompts):
    """A search of a second or two."""
    return [model_folder, "--prompts", prompts, "--max-new-tokens", 6, "--finalists", 2, "--seed", 0]


def test_a_search_writes_a_profile_that_can_be_applied(layerskip, options, model_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))  # no reference run of an earlier search
    done = layerskip("search", *options, "--trials", 3, "--json")
    assert done.status == 0
    result = done.object
    profile = DraftProfile.load("draft_profile.json")
    assert result["profile"] == "draft_profile.json"
    assert result["study"] == profile.provenance.study
    assert result["study"].startswith("tiny-")
    assert result["trials"] == 3
    assert 0 <= result["measured"] <= 3
    assert result["speedup"] == profile.measured.speedup
    assert (result["prompt_set"], result["interrupted"], result["near_ties"]) == ("held-out", False, 0)
    assert result["speedup_low"] <= result["speedup"] <= result["speedup_high"]
    assert f"loading {model_folder}" in done.err
    said = done.err.splitlines()
    [first] = [line for line in said if line.startswith("trial 0: ")]
    assert re.match("trial 0: (predicted|measured) ", first)
    assert first.endswith("  [nothing skipped: int4]")
    # With few prompts, all do everything.
    assert said[1] == "1 prompt held out, too few to show a gain: that takes 6, of 24 prompts"
    reference = said.index("8 reference prompts: what the model writes shows which drafts it would accept")
    assert said[reference + 1 : reference + 3] == [
        "measuring the costs of passes on this device, which takes half a minute or more",
        "trying candidates: each is predicted, the most promising ones are measured by decoding",
    ]
    precision = "full precision" if profile.precision == "full" else profile.precision
    [held_out] = [line for line in said if line.startswith(f"trial {profile.provenance.trial} on held-out prompts: ")]
    assert held_out.endswith(f"{profile.measured.speedup:.3f}× at {precision}")
    applied = layerskip("apply", "draft_profile.json", "hello", "--max-new-tokens", 4, "--force", "--json")
    assert applied.object["speculative"] is True


def test_a_search_tells_people_what_it_found(layerskip, options):
    done = layerskip("search", *options, "--trials", 2, "--out", "found.json")
    assert done.status == 0
    profile = DraftProfile.load("found.json")
    lines = done.out.splitlines()
    study = profile.provenance.study
    assert re.fullmatch(f"study     {study}, 2 candidates evaluated, [012] measured in trials", lines[0])
    assert lines[1] == f"skipped   {profile.skip_set}"
    assert lines[3].startswith(f"speedup   {profile.measured.speedup:.2f}× on 1 held-out prompt: ")
    assert "profile   found.json" in lines
    slower = profile.measured.speedup <= 1
    assert any(line.startswith("No candidate beat plain decoding;") for line in lines) == slower
    assert any(line.startswith("why       ") for line in lines) == slower
    assert any(line == 'apply     layerskip apply found.json "your prompt"' for line in lines) != slower


@pytest.mark.parametrize(
    ("speedup", "prompts", "said"),
    [
        (1.25, 8, []),
        (1.05, 8, ["No clear gain (the interval crosses 1×): nothing was shown to be faster."]),
        (1.25, 1, ["No clear gain: fewer than 6 prompts are not enough to show that anything is faster."]),
    ],
)
def test_a_search_says_where_the_best_speedup_shows_no_gain(make_profile, capsys, speedup, prompts, said):
    profile = DraftProfile.load(make_profile(speedup))
    profile = profile.model_copy(update={"measured": profile.measured.model_copy(update={"prompts": prompts})})
    use = search_command.ProfileUse(Path("found.json"), RunOptions("auto", "auto", "auto", False), "eager")
    search_command._report(SearchResult("s", 3, 1, profile, interrupted=False), use, STORAGE, None, json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("profile   found.json") + 1 :] == [*said, *use.lines(), "report    layerskip report s"]


def test_a_profile_is_used_as_it_was_searched():
    use = search_command.ProfileUse(
        Path("my profiles/it's.json"), RunOptions("cpu", "bfloat16", "packed", True), "packed"
    )
    shell, python, generation, transformers = use.lines()
    assert shlex.split(shell)[1:] == [
        "layerskip", "apply", "my profiles/it's.json", "your prompt", "--device", "cpu", "--dtype", "bfloat16",
        "--engine", "packed", "--compile",
    ]  # fmt: skip
    assert python == (
        """Python    drafter = DraftProfile.load("my profiles/it's.json").drafter(model)  # all of it: docs/python.md"""
    )
    assert generation == '          generate(model, ids, drafter=drafter, engine=make_engine(model, "packed"))'
    assert transformers == (
        "or        hf_model.generate(**inputs, max_new_tokens=100, "
        """custom_generate=layerskip.speculate("my profiles/it's.json", engine="packed"))  # docs/transformers.md"""
    )


def test_the_report_of_a_study_is_a_line_to_copy_that_gives_no_password_away(monkeypatch):
    line, secret = search_command.report_line, "postgresql://me:secret@host/db"
    assert line("my study", STORAGE) == "report    layerskip report 'my study'"
    assert line("s", "sqlite:///demo.db") == "report    layerskip report s --storage sqlite:///demo.db"
    assert line("s", secret) == "report    layerskip report s --storage 'postgresql://me:***@host/db'"
    monkeypatch.setenv("LAYERSKIP_STORAGE", secret)
    assert line("s", secret) == "report    layerskip report s"
    assert line("s", STORAGE) == f"report    layerskip report s --storage {STORAGE}"


def test_the_same_command_with_more_trials_resumes(layerskip, options):
    first = layerskip("search", *options, "--trials", 1, "--json").object
    done = layerskip("search", *options, "--trials", 2, "--json")
    assert done.object["study"] == first["study"]
    assert done.object["trials"] == 2
    assert f"study {first['study']}: 1 of 2 candidates evaluated, {first['measured']} measured" in done.err
    assert "8 reference texts reused from an earlier search" in done.err.splitlines()
    assert "measuring the costs of passes on this device" not in done.err
    assert not any(line.startswith("trial 0: ") for line in done.err.splitlines())


def test_a_study_resumes_only_with_the_settings_it_was_made_with(layerskip, options, other_model_folder):
    named = ["--study", "mine", "--trials", 1]
    assert layerskip("search", *options, *named).status == 0
    longer = layerskip("search", *options, *named, "--max-new-tokens", 7)
    assert longer.status == 2
    assert longer.err.splitlines()[-1].startswith(
        "layerskip: study 'mine': cannot be resumed, because this differs: max_new"
    )
    other = layerskip("search", other_model_folder, *options[1:], *named)
    assert other.status == 2
    assert "this differs: fingerprint (" in other.err.splitlines()[-1]


def last_line(done):
    """The error of a search: the last line of stderr, after what it was doing."""
    assert done.out == ""
    assert "Traceback" not in done.err
    *said, error = done.err.splitlines()
    assert all(line.startswith("loading ") for line in said)
    return error


def test_a_folder_that_is_missing_or_a_folder_itself_is_found_out_before_the_search(layerskip, options, elsewhere):
    missing = layerskip("search", *options, "--out", "no/such/folder/profile.json")
    assert missing.status == 2
    assert missing.error == (f"--out no/such/folder/profile.json: no such folder: {elsewhere}/no/such/folder")
    folder = layerskip("search", *options, "--out", ".")
    assert (folder.status, folder.error) == (2, "--out .: is a folder; expected a file name")
    below = layerskip("search", *options, "--out", "prompts.txt/profile.json")
    assert below.status == 2
    assert below.error.startswith("--out prompts.txt/profile.json: no such folder")
    assert not Path("layerskip.db").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_found_out_before_the_search(layerskip, options, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = layerskip("search", *options, "--out", locked / "profile.json")
    assert done.status == 2
    assert "is not writable" in done.error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trials", 0], "trials: expected at least 1, got 0"),
        (["--timeout", 0], "timeout: expected a number of seconds above 0, got 0"),
        (["--max-new-tokens", -3], "max_new_tokens: expected at least 1, got -3"),
        (["--prompts-per-trial", 0], "prompts_per_trial: expected at least 1, got 0"),
        (["--finalists", 0], "finalists: expected at least 1, got 0"),
        (["--prompts", "missing.txt"], "missing.txt: cannot read the prompts: No such file"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        (["--dtype", "float3"], "dtype 'float3' is unknown"),
        (["--max-new-tokens", 600], "prompt 1: "),
        (["--seed", -1], "seed: "),
        (["--sampler", "dice"], "sampler 'dice' is unknown; expected tpe, greybox"),
        (["--workers", 0], "workers: expected at least 1, got 0"),
        (["--workers", 3, "--devices", "cpu,cpu"], "--workers 3: --devices names 2, "),
        (["--devices", "abacus,cpu"], "device 'abacus' is not available"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_bad_value_is_wrong_usage_in_one_line(layerskip, options, arguments, named):
    done = layerskip("search", *options, "--trials", 1, *arguments)
    assert done.status == 2
    assert last_line(done).startswith(f"layerskip: {named}")
    assert not Path("draft_profile.json").exists()


def test_a_single_prompt_is_wrong_usage(layerskip, options, prompts):
    prompts.write_text("only one\nonly one\n")
    done = layerskip("search", *options)
    assert done.status == 2
    assert "at least 2 different ones" in last_line(done)


def test_a_misspelled_model_fails_in_one_line_with_a_guess(layerskip, options):
    done = layerskip("search", "smolm2", *options[1:])
    assert done.status == 1
    assert last_line(done).startswith("layerskip: model 'smolm2': ")
    assert last_line(done).endswith("did you mean 'smollm2'?")
    assert not list(Path().glob("*.db"))


def test_a_folder_that_is_no_model_fails_in_one_line(layerskip, options, tmp_path):
    done = layerskip("search", tmp_path, *options[1:])
    assert done.status == 1
    assert "the folder has no config.json" in last_line(done)


def test_a_model_of_another_family_fails_with_those_that_are_supported(layerskip, options, model_folder, tmp_path):
    folder = tmp_path / "seed"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    done = layerskip("search", folder, *options[1:])
    assert done.status == 1
    assert last_line(done).startswith("layerskip: model type 'seed_oss' is not supported; supported: gemma, gemma2, ")


def test_an_unknown_precision_is_refused_before_the_model_is_loaded(layerskip, options):
    done = layerskip("search", *options, "--precision", "int5")
    assert (done.status, done.error) == (2, "precision 'int5' is unknown; expected full, int8, int4")
    assert "loading" not in done.err


def test_precisions_can_be_named(layerskip, options):
    name = layerskip("search", *options, "--trials", 1, "--precision", "int4", "--precision", "full", "--json").object[
        "study"
    ]
    space = load_study(open_storage(STORAGE), name).user_attrs["layerskip"]["space"]
    assert space["precisions"] == ["full", "int4"]


def test_a_bad_storage_fails_in_one_line(layerskip, options):
    done = layerskip("search", *options, "--storage", "sqlite:////no/such/folder/s.db")
    reason = "cannot create the file: no such folder: /no/such/folder"
    assert (done.status, done.error) == (1, f"storage 'sqlite:////no/such/folder/s.db': {reason}")
    assert "loading" not in done.err


def test_a_time_limit_ends_a_search_with_what_it_has(layerskip, options):
    assert layerskip("search", *options, "--trials", 1).status == 0
    assert STORAGE not in Path("draft_profile.json").read_text()  # an URL may hold a password
    done = layerskip("search", *options, "--trials", 1000, "--timeout", 0.5, "--json")
    assert done.status == 0
    assert 1 <= done.object["trials"] < 1000
    evaluated = done.object["trials"]
    assert f"--timeout 0.5 ended the trials after {evaluated} of 1000 candidates" in done.err.splitlines()
    assert done.object["interrupted"] is False


def test_what_a_draft_can_have_is_left_out_on_request(layerskip, options):
    plain = ["--no-bridges", "--no-draft-vocabulary", "--no-target-confidence", "--no-trees", "--no-prompt-lookup"]
    name = layerskip("search", *options, "--trials", 1, *plain, "--json").object["study"]
    space = load_study(open_storage(STORAGE), name).user_attrs["layerskip"]["space"]
    assert (space["bridges"], space["vocabulary_sizes"], space["tree_sizes"]) == (False, [0], [])
    assert (space["target_confidence_thresholds"], space["prompt_lookup"]) == ([0.0], False)
    other = layerskip("search", *options, "--trials", 1, "--json").object["study"]
    assert other != name


@pytest.fixture
def tuned(wrapped, tmp_path):
    """The file of a profile with a trained layer and a draft vocabulary."""
    layer_profile(wrapped, start=4, vocabulary=range(5, 200)).save(tmp_path / "tuned.json")
    return tmp_path / "tuned.json"


def test_a_trained_draft_layer_is_tried_on_request(layerskip, options, tuned, wrapped, tmp_path):
    bridge_profile(wrapped, start=6).save(tmp_path / "bridge.json")
    both = ["--draft-layer", tuned, "--draft-layer", tmp_path / "bridge.json"]
    done = layerskip("search", *options, "--trials", 2, *both, "--json")
    assert done.status == 0, done.err
    study = load_study(open_storage(STORAGE), done.object["study"])
    space = study.user_attrs["layerskip"]["space"]
    assert [(one["kind"], one["start"], one["vocabulary_size"]) for one in space["draft_layers"]] == [
        ("layer", 4, 195),
        ("bridge", 6, 0),
    ]
    assert 195 in space["vocabulary_sizes"]
    [line] = [line for line in done.err.splitlines() if line.startswith("trial 0: ")]
    assert "trained layer after layer 2 (" in line
    assert line.endswith("  [trained draft layer 1 of 2]")
    profile = DraftProfile.load("draft_profile.json")
    assert profile.tensors.layers + profile.tensors.bridges == 1
    applied = layerskip("apply", "draft_profile.json", "hello", "--max-new-tokens", 4, "--force", "--json")
    assert applied.object["speculative"] is True
    again = layerskip("search", *options, "--trials", 3, *both[2:], *both[:2], "--json")
    assert again.object["study"] == done.object["study"]
    assert layerskip("search", *options, "--trials", 1, "--json").object["study"] != done.object["study"]


def test_a_profile_without_a_draft_layer_is_refused_in_one_line(
    layerskip, options, profile, wrapped, other_model_folder, tmp_path
):
    def refusal(file, *model):
        done = layerskip("search", *(model or options[:1]), *options[1:], "--trials", 1, "--draft-layer", file)
        assert not Path("draft_profile.json").exists()
        return done.status, last_line(done)

    status, plain = refusal(profile)
    assert status == 2
    assert plain.startswith(
        f"layerskip: {profile}: has no draft layer in place of the layers above an early exit; train one with"
    )
    heads = profile_with(wrapped, DraftWeights(heads=random_heads(wrapped, "hydra")), skip_set=SkipSet(4))
    heads.save(tmp_path / "heads.json")
    assert "'layerskip compare' compares them" in refusal(tmp_path / "heads.json")[1]
    layer_profile(wrapped).save(tmp_path / "tuned.json")
    status, other = refusal(tmp_path / "tuned.json", other_model_folder)
    assert status == 1
    assert "tuned.json: model.fingerprint: the profile is for " in other
    status, text = refusal("prompts.txt")
    assert status == 1
    assert text.startswith("layerskip: prompts.txt: not JSON: ")
    status, missing = refusal("missing.json")
    assert status == 1
    assert "missing.json" in missing


@pytest.mark.slow
def test_several_workers_search_with_a_draft_layer(layerskip, options, tuned):
    more = ["--draft-layer", tuned, "--workers", 2, "--sampler", "tpe", "--json"]
    done = layerskip("search", *options, "--trials", 16, *more)
    assert done.status == 0
    assert 16 <= done.object["trials"] <= 17
    assert "failed" not in done.err


@pytest.mark.slow
def test_several_workers_search_together(layerskip, options):
    done = layerskip("search", *options, "--trials", 16, "--workers", 2, "--sampler", "tpe", "--json")
    assert done.status == 0
    assert 16 <= done.object["trials"] <= 17
    assert "failed" not in done.err
    assert "[I " not in done.err


def wait_for(process, beginning):
    """Read stderr up to a line that begins like this; return all lines."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"never said '{beginning}': {lines}")


@pytest.mark.parametrize("pressed", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_and_sigterm_keep_finished_trials_and_resume(layerskip, options, model_folder, pressed):
    arguments = [str(part) for part in ("search", *options, "--trials", 40, "--max-new-tokens", 60, "--json")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([COMMAND, *arguments], env=ENVIRONMENT, **pipes) as process:
        try:
            wait_for(process, "trial 0: ")
            process.send_signal(pressed)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    result = json.loads(out)
    assert result["interrupted"] is True
    assert 1 <= result["trials"] < 40
    study = load_study(open_storage(STORAGE), result["study"])
    assert len(evaluated_trials(study)) == result["trials"]
    assert result["measured"] == len(measured_trials(study))
    completed = completed_trials(study)
    assert (result["profile"] is None) == (not completed)  # the profile reports what was measured, or is not there
    if completed:
        assert result["prompt_set"] == "search"

    arguments[arguments.index("40")] = str(result["trials"] + 2)
    again = layerskip(*arguments).object
    assert again["study"] == result["study"]
    assert (again["trials"], again["interrupted"]) == (result["trials"] + 2, False)
    assert again["prompt_set"] == "held-out"
    DraftProfile.load(again["profile"]).check(LayerSkipModel(load_checkpoint(str(model_folder), device="cpu").model))
