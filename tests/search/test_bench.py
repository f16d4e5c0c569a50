"""Measuring a profile again."""

from dataclasses import replace

import pytest

from layerskip import FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.drafter import LayerSkipDrafter
from layerskip.errors import LosslessnessError
from search.bench import bench
from search.interleaving import timed
from search.machine_lock import MachineLock
from search.measure import summarize
from tests.models import LAYERS, tiny_llama
from tests.search.searches import encoded_prompt

PROMPTS = [encoded_prompt("a", [3, 1, 4]), encoded_prompt("b", [1, 5, 9, 2]), encoded_prompt("c", [6])]


@pytest.fixture
def model():
    return LayerSkipModel(tiny_llama())


@pytest.fixture
def run(model, tmp_path):
    def measure(drafter=None, **options):
        drafter = drafter or LayerSkipDrafter(model, SkipSet(LAYERS, (2,)), FixedLength(3))
        rest = {
            "max_new_tokens": 12,
            "repeats": 3,
            "quiet": MachineLock(tmp_path, model.device),
            "on_prompt": int,
        } | options
        return bench(model, drafter, PROMPTS, **rest)

    return measure


@pytest.fixture
def changed(monkeypatch):
    """Let every run be changed before it counts."""

    def change(changing):
        def changed_run(model, contender, *rest):
            return changing(contender.name, timed(model, contender, *rest))

        monkeypatch.setattr("search.interleaving.timed", changed_run)

    return change


def test_every_prompt_is_decoded_both_ways_as_often_as_asked_and_in_turn(run, monkeypatch):
    calls, counted = [], []

    def noted(model, contender, prompt, *rest):
        calls.append((prompt.id, contender.name))
        return timed(model, contender, prompt, *rest)

    monkeypatch.setattr("search.interleaving.timed", noted)
    run(repeats=2, on_prompt=counted.append)
    assert [prompt for prompt, _ in calls[::2]] == [prompt for prompt, _ in calls[1::2]] == ["a", "b", "c"] * 2
    assert all({one, other} == {"plain", "draft"} for (_, one), (_, other) in zip(calls[::2], calls[1::2], strict=True))
    assert all({first for prompt, first in calls[::2] if prompt == one} == {"plain", "draft"} for one in "abc")
    assert counted == [1, 2, 3, 4, 5, 6]


def test_a_prompt_counts_with_the_median_of_its_repeats(run, changed, monkeypatch):
    seconds = iter([1.0, 9.0, 2.0])
    changed(lambda name, one: replace(one, seconds=4.0 if name == "plain" else next(seconds)))
    monkeypatch.setattr("tests.search.test_bench.PROMPTS", PROMPTS[:1])
    result = run()
    assert [(one.plain_seconds, one.draft_seconds) for one in result.prompts] == [(4.0, 2.0)]
    assert result.summary.speedup == 2.0


def test_the_summary_is_that_of_the_prompts(run):
    result = run()
    assert result.summary == summarize(result.prompts)
    assert [one.prompt for one in result.prompts] == ["a", "b", "c"]


def test_accepted_tokens_are_counted_by_the_round(run, model):
    drafter = LayerSkipDrafter(model, SkipSet(LAYERS), FixedLength(3))
    result = run(drafter)
    made = [generate(model, prompt.tokens, drafter=drafter, max_new_tokens=12).stats for prompt in PROMPTS]
    assert result.mean_accepted == sum(one.accepted for one in made) / sum(one.rounds for one in made)
    assert result.summary.acceptance_rate == 1


def test_one_token_takes_no_round(run):
    assert run(max_new_tokens=1).mean_accepted is None


def test_a_draft_that_changes_the_text_is_an_error(run, changed, model):
    def other(name, one):
        tokens = tuple((token + 1) % model.vocab_size for token in one.decoded.tokens)
        return one if name == "plain" else replace(one, decoded=replace(one.decoded, tokens=tokens))

    changed(other)
    with pytest.raises(LosslessnessError):
        run(repeats=1)
