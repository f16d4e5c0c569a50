"""``layerskip compare``."""

from pathlib import Path

import pytest

from benchmarks.add_profile import add_profile

THEIRS = ["transformers plain", "transformers prompt lookup", "transformers early exit 2"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one two one two one\ntwo\none two one two one\nthree\n")
    return file


@pytest.fixture
def compare(layerskip, prompts, model_folder):
    def run(*arguments):
        common = ("--prompts", prompts, "--max-new-tokens", 12, "--repeats", 2, "--device", "cpu")
        return layerskip("compare", model_folder, *common, *arguments)

    return run


def test_every_method_is_in_the_table_and_the_last_line_says_what_to_use(compare, profile, make_profile):
    other = make_profile(None, name="other.json")
    done = compare("--profile", profile, "--profile", other, "--combine", "-o", "compared.html")
    assert done.status == 0
    assert done.err.splitlines() == ["decoding 3 prompts with 11 methods, 2 times each"]
    lines = done.out.splitlines()
    prompts = "3 of at most 12 tokens, each at least 2 times, interleaved"  # the repeated one counts once
    assert lines[3] == f"prompts   {prompts}"
    begins = [line.strip() for line in lines]
    ways = [
        "plain decoding",
        "prompt lookup",
        "profile",
        "profile + prompt lookup",
        "other",
        "other + prompt lookup",
        *THEIRS,
    ]
    for way in [*ways, "transformers assistant (profile)", "transformers assistant (other)"]:
        assert any(line.startswith(f"{way} ") and line.endswith("same") for line in begins), way
    assert lines[-2] == "report    compared.html"
    assert lines[-1].startswith("No clear gain: fewer than 6 prompts ")
    assert lines[-1] in Path("compared.html").read_text()


def test_one_object_has_all_the_figures(compare, profile):
    done = compare("--profile", profile, "--json", "--no-transformers")
    assert done.status == 0
    assert done.err.splitlines() == ["decoding 3 prompts with 3 methods, 2 times each"]
    result = done.object
    assert [one["name"] for one in result["entries"]] == ["plain decoding", "prompt lookup", "profile"]
    assert (result["prompts"], result["repeats"], result["max_new_tokens"]) == (3, 2, 12)
    assert (result["dtype"], result["engine"], result["left_out"], result["report"]) == ("float32", "eager", {}, None)
    for one in result["entries"]:
        assert one["speedup_low"] <= one["speedup"] <= one["speedup_high"]
        assert len(one["prompt_speedups"]) == 3
        assert one["tokens_per_pass"] >= 1
        assert one["different"] == 0
    plain, _, drafted = result["entries"]
    assert (plain["speedup"], plain["acceptance_rate"]) == (1, None)
    assert 0 <= drafted["acceptance_rate"] <= 1
    assert drafted["draft_cost"] > 0
    assert result["best"] is None
    assert result["advice"].startswith("No clear gain: fewer than 6 prompts ")


def test_ready_profiles_of_the_model_are_included(compare, profile, tmp_path, monkeypatch):
    ready = tmp_path / "ready"
    ready.mkdir()
    (ready / "index.json").write_text("{}")
    monkeypatch.setattr("layerskip.ready_profiles.FOLDER", ready)
    add_profile("tiny", Path(profile), "cpu")
    without = compare("--json", "--no-transformers").object
    assert [one["name"] for one in without["entries"]][2:] == ["ready tiny"]
    given = compare("--json", "--no-transformers", "--profile", profile).object
    assert [one["name"] for one in given["entries"]][2:] == ["profile"]


def test_a_profile_of_another_model_is_refused(layerskip, profile, narrow_model_folder, prompts):
    done = layerskip("compare", narrow_model_folder, "--profile", profile, "--prompts", prompts)
    assert done.status == 1
    assert done.error.startswith(f"{profile}: model.intermediate_size: ")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["-o", "no/report.html"], 2, "--out no/report.html: no such folder: "),
        (["--profile", "none.json"], 1, "none.json: "),
        (["--engine", "cuda-graphs"], 2, "engine 'cuda-graphs': "),
        (["--repeats", 0], 2, "Invalid value for '--repeats': "),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(compare, arguments, status, said):
    done = compare(*arguments)
    assert done.status == status
    assert done.error.startswith(said)


def test_a_suite_is_compared_by_category(layerskip, profile, suite, elsewhere, model_folder):
    arguments = ["compare", model_folder, "--profile", profile, "--suite", suite, "--per-category", 1]
    arguments += ["--no-transformers", "--repeats", 1, "--max-new-tokens", 4]
    entries = layerskip(*arguments, "--json", "-o", "page.html").object["entries"]
    for entry in entries:
        assert [each["category"] for each in entry["categories"]] == ["mt-bench", "qa", "rag", "all categories"]
    assert 'id="categories"' in (elsewhere / "page.html").read_text()
    assert "speedup by category" in layerskip(*arguments).out
