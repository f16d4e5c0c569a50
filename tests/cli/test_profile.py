"""``layerskip profile``."""

import json
from pathlib import Path

import pytest

from layerskip import DraftProfile
from layerskip.costs import DraftRoundCosts


def test_show_prints_what_a_profile_holds(layerskip, profile, model_folder):
    done = layerskip("profile", "show", profile)
    assert (done.status, done.err) == (0, "")
    assert f"model     {model_folder} (llama, 4 layers, fingerprint " in done.out
    assert "skipped   attn 1 · mlp 2 (2 of 8 sublayers)" in done.out
    assert "draft     3 tokens" in done.out
    assert "measured  1.25× (95 %: 1.15 to 1.35), 75% accepted, on 8 held-out prompts of at most 48 tokens" in done.out
    assert "from      study s, trial 7; 2026-01-02 03:04 by layerskip 0.1.0" in done.out


def test_show_prints_that_a_profile_was_never_measured(layerskip, make_profile):
    done = layerskip("profile", "show", make_profile(None))
    assert done.status == 0
    assert "measured  never" in done.out
    assert "from      made by hand" in done.out


def test_show_prints_whose_costs_pause_a_draft(layerskip, make_profile):
    path = make_profile(None)
    assert "pauses" not in layerskip("profile", "show", path).out
    costs = DraftRoundCosts("a machine", "float32", "eager", (64, 512), ((0, 0),), ((0, 0),), (1,), ((1, 1),))
    DraftProfile.load(path).model_copy(update={"costs": costs}).save(path)
    shown = layerskip("profile", "show", path).out
    assert "pauses    where it does not pay, by the costs of a machine, float32" in shown


def test_show_prints_that_a_profile_was_trained(layerskip, make_profile):
    path = make_profile(None)
    made = DraftProfile.load(path)
    provenance = made.provenance.model_copy(update={"training_seconds": 1331.6})
    made.model_copy(update={"provenance": provenance}).save(path)
    said = layerskip("profile", "show", path).out
    assert "from      trained for 22 min 12 s; 2026-01-02 03:04 by layerskip 0.1.0" in said


def test_show_prints_the_whole_profile_as_json(layerskip, profile):
    done = layerskip("profile", "show", profile, "--json")
    assert (done.status, done.err) == (0, "")
    assert done.object == json.loads(Path(profile).read_text())


def test_check_says_that_a_profile_is_valid(layerskip, profile):
    done = layerskip("profile", "check", profile)
    assert (done.status, done.out, done.err) == (0, f"{profile}: a valid draft profile\n", "")
    assert layerskip("profile", "check", profile, "--json").object == {
        "profile": profile,
        "valid": True,
        "model": None,
        "same_weights": None,
    }


def test_check_says_whether_a_profile_is_for_a_model(layerskip, profile, model_folder, narrow_model_folder):
    done = layerskip("profile", "check", profile, "--model", model_folder)
    assert (done.status, done.out) == (0, f"{profile}: a valid draft profile for {model_folder}\n")

    wrong = layerskip("profile", "check", profile, "--model", narrow_model_folder)
    assert wrong.status == 1
    assert wrong.error.startswith(f"{profile}: model.intermediate_size: the profile is for ")
    as_json = layerskip("profile", "check", profile, "--model", narrow_model_folder, "--json")
    assert (as_json.status, as_json.error) == (1, wrong.error)


@pytest.mark.parametrize("command", ["show", "check"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda entry: entry | {"version": 5}, "version: expected 1, 2, 3 or 4, found 5"),
        (lambda entry: entry | {"colour": "red"}, "colour: unknown field"),
        (lambda entry: entry | {"skip_set": {"num_layers": 4, "attention": [9]}}, "layer 9 is out of range"),
        (lambda entry: [entry], "expected"),
    ],
)
def test_a_bad_profile_is_named_with_what_was_expected(layerskip, profile, command, change, expected):
    path = Path(profile)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    done = layerskip("profile", command, profile)
    assert done.status == 1
    assert done.error.startswith(f"{profile}: ")
    assert expected in done.error


def test_push_publishes_a_profile_under_its_model_s_name_on_the_hub(layerskip, hub, profile, model_folder):
    done = layerskip("profile", "push", profile, "me/drafts", "--base-model", "owner/tiny", "--base-revision", "v1")
    repository = hub.repositories["me/drafts"]
    commit = repository.branches["main"]
    assert (done.status, done.out, done.err) == (0, f"{profile}: {hub.url}/me/drafts/commit/{commit}\n", "")
    published = json.loads(repository.files()["draft_profile.json"])
    assert (published["base_model_name_or_path"], published["revision"]) == ("owner/tiny", "v1")
    assert not any(str(model_folder).encode() in content for content in repository.files().values())


def test_push_prints_where_it_went_as_json(layerskip, hub, profile):
    done = layerskip("profile", "push", profile, "me/drafts", "--base-model", "owner/tiny", "--json")
    commit = hub.repositories["me/drafts"].branches["main"]
    assert done.object == {
        "profile": profile,
        "repository": "me/drafts",
        "address": f"{hub.url}/me/drafts/commit/{commit}",
    }


def test_push_asks_for_the_model_s_name_where_the_profile_has_only_a_folder(layerskip, hub, profile):
    done = layerskip("profile", "push", profile, "me/drafts")
    assert done.status == 2
    assert "--base-model" in done.error
    assert hub.requests == []


@pytest.fixture
def ready(monkeypatch, tmp_path, profile):
    """The profile is a ready one, by the name of tiny."""
    from benchmarks.add_profile import add_profile
    from layerskip import ready_profiles

    folder = tmp_path / "ready"
    folder.mkdir()
    monkeypatch.setattr(ready_profiles, "FOLDER", folder)
    (folder / "index.json").write_text(ready_profiles.ProfileIndex().model_dump_json())
    return add_profile("tiny", Path(profile), "cpu")


def test_list_shows_the_ready_profiles(layerskip, ready):
    done = layerskip("profile", "list")
    header, line = done.out.splitlines()
    assert header.split() == ["name", "model", "speedup", "measured", "on"]
    assert line.split()[0] == "tiny"
    assert "1.25× (95 %: 1.15 to 1.35)" in line
    assert "a processor, float32" in line
    [entry] = layerskip("profile", "list", "--json").object["profiles"]
    assert (entry["name"], entry["file"], entry["speedup"]) == ("tiny", "tiny-cpu-float32.json", 1.25)


@pytest.mark.parametrize("command", ["show", "check"])
def test_a_ready_profile_is_taken_by_its_name(layerskip, ready, command):
    assert layerskip("profile", command, "tiny").status == 0


def test_a_ready_profile_is_applied_by_its_name(layerskip, ready, profile):
    by_name, by_file = (
        layerskip("apply", source, "hello", "--max-new-tokens", 8, "--json").object for source in ("tiny", profile)
    )
    assert by_name["token_ids"] == by_file["token_ids"]
    assert by_name["speculative"] is True
