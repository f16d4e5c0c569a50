"""``layerskip bench``."""

import json
import re
from pathlib import Path

import pytest

from cli import bench_command as command
from layerskip import DraftProfile

HERE = {
    "profile": "draft.json",
    "model": "Tiny",
    "max_new_tokens": 48,
    "repeats": 3,
    "device": "a processor",
    "engine": "packed",
    "dtype": "float32",
    "plain_tokens_per_second": 10.0,
    "draft_tokens_per_second": 12.0,
    "acceptance_rate": 0.5,
    "drafted": 100,
    "mean_accepted": 1.0,
    "near_ties": 0,
    "disturbed": 0,
    "profile_measured": None,
}


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\none\nthree\n")
    return file


@pytest.fixture
def bench(layerskip, prompts):
    def run(profile, *arguments):
        return layerskip("bench", profile, "--prompts", prompts, "--max-new-tokens", 12, "--repeats", 2, *arguments)

    return run


def test_the_profiles_own_figures_are_printed_too(bench, profile):
    done = bench(profile)
    assert done.status == 0
    assert f"profile   {profile}, for " in done.out
    assert "prompts   3 prompts of at most 12 tokens, 2 times each" in done.out
    assert "accepted  " in done.out
    assert "speedup   " in done.out
    assert "recorded  1.25× (95 %: 1.15 to 1.35) on a processor, float32, 8 held-out prompts" in done.out


def test_one_object_has_all_the_figures(bench, profile):
    done = bench(profile, "--json")
    assert done.status == 0
    assert done.err.splitlines() == ["decoding 3 prompts with and without the draft, 2 times each"]
    result = done.object
    assert result["prompts"] == 3  # the repeated one counts once
    assert (result["repeats"], result["max_new_tokens"], result["dtype"]) == (2, 12, "float32")
    assert result["speedup_low"] <= result["speedup"] <= result["speedup_high"]
    assert len(result["prompt_speedups"]) == 3
    assert 0 <= result["acceptance_rate"] <= 1
    assert result["mean_accepted"] >= 0
    assert result["profile_measured"] == json.loads(Path(profile).read_text())["measured"]


def test_a_profile_that_does_not_pay_is_measured_with_its_draft_all_the_same(bench, make_profile):
    assert bench(make_profile(0.8), "--json").object["drafted"] > 0


def test_a_profile_that_was_never_measured_has_no_recorded_figures(bench, make_profile):
    assert "recorded  none: the profile was never measured" in bench(make_profile(None)).out
    assert bench(make_profile(None), "--json").object["profile_measured"] is None


def test_without_prompts_the_built_in_ones_that_searches_hold_out_are_decoded_as_the_profile_was_measured(
    layerskip, make_profile, tmp_path
):
    """To fewer tokens than a search's default, so that the longest built-in prompt fits the tiny model's context."""
    path = make_profile(1.25)
    loaded = DraftProfile.load(path)
    loaded.model_copy(update={"measured": loaded.measured.model_copy(update={"max_new_tokens": 2})}).save(path)
    result = layerskip("bench", path, "--repeats", 1, "--json")
    assert result.status == 0, result.err
    assert (result.object["prompts"], result.object["max_new_tokens"]) == (8, 2)


def test_another_model_is_refused(bench, profile, narrow_model_folder):
    done = bench(profile, "--model", narrow_model_folder)
    assert done.status == 1
    assert done.error.startswith(f"{profile}: model.intermediate_size: ")


def test_one_prompt_has_no_interval(layerskip, profile, tmp_path):
    (tmp_path / "one.txt").write_text("one\n")
    done = layerskip("bench", profile, "--prompts", tmp_path / "one.txt", "--max-new-tokens", 4, "--repeats", 1)
    (speedup,) = re.findall("^speedup   (.*)$", done.out, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d\d×", speedup)


@pytest.mark.parametrize(
    ("low", "prompts", "doubt"),
    [
        (0.9, 8, "No clear gain (the interval crosses 1×): nothing was shown to be faster.\n"),
        (1.1, 1, "No clear gain: fewer than 6 prompts are not enough to show that anything is faster.\n"),
        (1.1, 8, ""),
    ],
)
def test_a_speedup_that_shows_nothing_is_said_to_show_nothing(capsys, low, prompts, doubt):
    figures = {"speedup": 1.2, "speedup_low": low, "speedup_high": 1.3, "prompts": prompts}
    command._report(HERE | figures, None, "prompt")
    assert capsys.readouterr().out.endswith(f"recorded  none: the profile was never measured\n{doubt}")


def test_a_prompt_that_does_not_fit_is_named(layerskip, profile, tmp_path):
    (tmp_path / "long.txt").write_text("short\n" + "x" * 600)
    done = layerskip("bench", profile, "--prompts", tmp_path / "long.txt")
    assert done.status == 2
    assert done.error.startswith("prompt 2: ")


def test_a_suite_gives_figures_by_category(layerskip, profile, suite):
    arguments = ("bench", profile, "--suite", suite, "--per-category", 2, "--max-new-tokens", 4, "--repeats", 1)
    given = layerskip(*arguments, "--json").object
    assert [each["category"] for each in given["categories"]] == ["mt-bench", "qa", "rag", "all categories"]
    assert [each["questions"] for each in given["categories"]] == [2, 2, 2, 6]
    assert given["prompts"] == 6
    assert all(each["mean_accepted_length"] >= 1 for each in given["categories"])
    shown = layerskip(*arguments).out
    assert "prompts   6 questions of at most 4 tokens" in shown
    assert re.search(r"^\s*mt-bench\s+2\s+\d+\.\d\d×", shown, re.MULTILINE)


def test_a_suite_and_prompts_exclude_one_another(layerskip, profile, suite, tmp_path):
    (tmp_path / "own.txt").write_text("one\n")
    done = layerskip("bench", profile, "--suite", suite, "--prompts", tmp_path / "own.txt")
    assert (done.status, done.error) == (2, "--suite and --prompts exclude one another; give one of them")
    done = layerskip("bench", profile, "--per-category", 3)
    assert (done.status, done.error) == (2, "--per-category: is of a suite; give --suite FILE")


def test_transformers_plain_decoding_is_named_beside_ours(layerskip, profile, suite):
    done = layerskip("bench", profile, "--max-new-tokens", 4, "--repeats", 1, "--engine", "eager")
    assert re.search(r"^baseline  \d+\.\d tokens/s in transformers' plain decoding of 2 of", done.out, re.MULTILINE)
