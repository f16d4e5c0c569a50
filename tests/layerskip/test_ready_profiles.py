"""Profiles by name: which of several is taken, what is not one, and how one gets there."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from benchmarks.add_profile import add_profile
from layerskip import DraftProfile, load_profile
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import HubError, InvalidInputError, InvalidProfileError
from layerskip.hub import save_profile
from layerskip.ready_profiles import FOLDER, find_profile, ready_profiles
from layerskip.utils import device_name
from tests.layerskip.test_profile import MEASURED, a_profile, same_weights, some_weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of ready profiles, in place of the one that ships with layerskip."""
    made = tmp_path / "ready"
    made.mkdir()
    (made / "index.json").write_text((FOLDER / "index.json").read_text())
    index = json.loads((made / "index.json").read_text())
    (made / "index.json").write_text(json.dumps(index | {"profiles": []}))
    monkeypatch.setattr("layerskip.ready_profiles.FOLDER", made)
    return made


@pytest.fixture
def add(folder, tmp_path):
    """Add a profile that was measured on some device to the ready ones."""

    def run(name, device_type="cpu", *, assets=None, **measured):
        profile = a_profile(assets or DraftWeights(), measured=MEASURED.model_copy(update=measured))
        profile.save(tmp_path / "found.json")
        return add_profile(name, tmp_path / "found.json", device_type)

    return run


def test_the_profiles_that_ship_are_listed_and_load():
    for entry in ready_profiles():
        profile = DraftProfile.load(FOLDER / entry.file)
        assert profile.model.fingerprint == entry.fingerprint
        assert profile.measured.speedup == entry.speedup
    listed = {entry.file for entry in ready_profiles()}
    assert listed == {path.name for path in FOLDER.glob("*.json")} - {"index.json"}


def test_a_profile_is_found_by_its_name(add, folder):
    entry = add("tiny")
    assert find_profile("tiny") == folder / entry.file
    assert load_profile("tiny").skip_set == a_profile().skip_set


def test_a_ready_profile_brings_its_tensors(add):
    add("tiny", assets=some_weights())
    assert same_weights(load_profile("tiny"), some_weights())


def test_of_several_the_one_from_the_kind_of_device_in_use_is_taken(add, folder):
    gpu, cpu = add("tiny", "cuda", device="a GPU", speedup=1.9), add("tiny", "cpu", speedup=1.1)
    assert gpu.file != cpu.file
    assert find_profile("tiny", device="cpu") == folder / cpu.file


def test_of_several_from_a_kind_of_device_the_one_of_the_dtype_in_use_is_taken(add, folder):
    short, full = add("tiny", dtype="bfloat16", speedup=1.9), add("tiny", dtype="float32")
    assert find_profile("tiny", device="cpu") == folder / full.file
    assert find_profile("tiny", device="cpu", dtype="bfloat16") == folder / short.file


def test_the_one_from_this_very_machine_comes_before_a_faster_one(add, folder, llama):
    here = add("tiny", device=device_name(llama.device), speedup=1.1)
    add("tiny", device="a faster processor", speedup=1.9)
    assert find_profile("tiny", device="cpu") == folder / here.file


def test_from_other_machines_the_fastest_is_taken_and_one_from_a_gpu_is_better_than_none(add, folder):
    add("tiny", "cuda", device="a GPU", speedup=1.1)
    fastest = add("tiny", "cuda", device="a better GPU", speedup=1.2)
    assert find_profile("tiny", device="cpu") == folder / fastest.file


def test_a_new_profile_from_the_same_machine_takes_the_place_of_the_old_one(add, folder):
    add("tiny", assets=some_weights(0))
    add("tiny", assets=some_weights(1), speedup=1.5)
    add("other")
    assert [(entry.name, entry.speedup) for entry in ready_profiles()] == [("other", 1.25), ("tiny", 1.5)]
    assert same_weights(load_profile("tiny"), some_weights(1))
    assert len(list(folder.glob("draft-*.safetensors"))) == 1


def test_a_file_comes_before_a_name(add, tmp_path, monkeypatch):
    add("tiny")
    monkeypatch.chdir(tmp_path)
    a_profile(target_confidence_threshold=0.5).save(tmp_path / "tiny")
    assert load_profile("tiny").target_confidence_threshold == 0.5


def test_a_folder_of_that_name_does_not_hide_the_name(add, tmp_path, monkeypatch):
    add("tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert load_profile("tiny").target_confidence_threshold == 0.0


def test_an_unknown_name_is_told_which_there_are_and_which_looks_alike(add):
    add("tiny")
    add("other")
    with pytest.raises(InvalidProfileError) as caught:
        load_profile("tinny")
    assert str(caught.value) == (
        "profile 'tinny': no such file, and no ready profile of that name (there are: other, tiny); "
        "did you mean 'tiny'?"
    )


def test_the_name_of_a_model_without_a_ready_profile_is_told_how_to_make_one(folder):
    with pytest.raises(
        InvalidProfileError, match=r"there is none yet\); make a profile with 'layerskip search smollm2'"
    ):
        load_profile("smollm2")


@pytest.mark.parametrize("source", ["missing.json", "over/here/missing", "./missing"])
def test_what_looks_like_a_file_is_taken_for_one(folder, source):
    with pytest.raises(InvalidProfileError, match="cannot read the draft profile: No such file"):
        load_profile(source)


def test_a_folder_with_a_profile_is_one_also_beside_a_model(add, tmp_path):
    add("tiny")
    save_profile(load_profile("tiny"), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert load_profile(str(tmp_path / "model")) == load_profile("tiny")


def test_what_is_neither_here_nor_ready_is_looked_for_on_the_hub(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"^owner/drafts: not in the cache"):
        load_profile("owner/drafts")


def test_a_model_in_place_of_a_profile_is_told_apart(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for source in (str(tmp_path), "weights.gguf"):
        with pytest.raises(
            InvalidProfileError, match=f"is a model, and not a draft profile; .*'layerskip search {source}"
        ):
            load_profile(source)


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"format": "other", "version": 1}', '{"version": 1, "profiles": [{"name": "x"}]}']
)
def test_a_damaged_index_is_named(folder, content):
    index = folder / "index.json"
    index.unlink() if content is None else index.write_text(content)
    with pytest.raises(InvalidProfileError, match=str(index)):
        ready_profiles()


def test_what_was_not_measured_on_held_out_prompts_is_no_ready_profile(folder, tmp_path):
    for measured in (None, MEASURED.model_copy(update={"prompt_set": "search"})):
        a_profile(measured=measured).save(tmp_path / "found.json")
        with pytest.raises(InvalidInputError, match="was not measured on held-out prompts"):
            add_profile("tiny", tmp_path / "found.json", "cpu")
    assert ready_profiles() == ()


def test_ready_profiles_are_part_of_the_package():
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"profiles/*"' in settings
    assert FOLDER.parent.name == "layerskip"
