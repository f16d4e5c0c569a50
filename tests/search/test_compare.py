"""Comparing decoding methods: the figures of each, which cannot take part, and whose output is another."""

from dataclasses import replace

import pytest

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import EagerEngine
from search.compare import compare, usable_methods
from search.decoding_methods import DecodingMethod, layerskip_method, transformers_method
from search.machine_lock import MachineLock
from search.measure import MeasuringPlan, timed
from studies.comparison import Comparison
from tests.models import LAYERS, tiny_llama
from tests.search.searches import encoded_prompt

PROMPTS = [encoded_prompt("a", [3, 1, 4]), encoded_prompt("b", [1, 5, 9, 2]), encoded_prompt("c", [6])]


@pytest.fixture
def model():
    return LayerSkipModel(tiny_llama())


def methods(model):
    whole = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS), stopping=FixedLength(3)))
    return [
        layerskip_method("plain", EagerEngine(model), None),
        layerskip_method("whole", EagerEngine(model), whole, draft_bytes=7, training_seconds=3.0),
        transformers_method("theirs", model),
    ]


@pytest.fixture
def run(model, tmp_path):
    def measure(some=None, *, repeats=3, on_prompt=int):
        plan, lock = MeasuringPlan(PROMPTS, 9, repeats), MachineLock(tmp_path, model.device)
        return compare(model, some or methods(model), plan, lock, on_prompt)

    return measure


@pytest.fixture
def taking(monkeypatch):
    """Let each run take as long as is said: by method and by how often it has decoded."""

    def take(seconds):
        calls = {}

        def said(model, method, *rest):
            number = calls[method.name] = calls.get(method.name, -1) + 1
            return replace(timed(model, method, *rest), seconds=seconds(method.name, number))

        monkeypatch.setattr("search.measure.timed", said)

    return take


def test_each_has_its_figures_in_the_order_of_the_methods(run):
    plain, whole, theirs = run()
    assert [plain.name, whole.name, theirs.name] == ["plain", "whole", "theirs"]
    assert (plain.speedup.value, plain.speedup.low, plain.speedup.high) == (1, 1, 1)
    assert (plain.acceptance_rate, plain.draft_cost, plain.tokens_per_pass) == (None, None, 1)
    assert whole.acceptance_rate == 1
    assert whole.tokens_per_pass == 9 / 3  # the prompt, and two rounds of at most four tokens
    assert whole.draft_cost > 0
    assert 0 < whole.draft_share < 1
    assert (whole.draft_bytes, whole.training_seconds) == (7, 3.0)
    assert (theirs.acceptance_rate, theirs.tokens_per_pass, theirs.draft_bytes) == (None, 1, 0)
    assert [prompt.prompt for prompt in theirs.prompts] == ["a", "b", "c"]
    assert all(one.near_ties == one.different == 0 for one in (plain, whole, theirs))
    assert all(one.lowest <= one.highest <= one.tokens_per_second * (1 + 1e-9) for one in (plain, whole, theirs))


def test_a_device_that_is_no_gpu_has_no_peak(run):
    assert {one.peak_bytes for one in run(repeats=1)} == {None}


def test_rates_are_those_of_the_repeats_and_the_speedup_that_of_the_fastest(run, taking):
    """Three prompts of nine tokens: plain decoding takes a second each; the other 0.5 s, but 4.5 s in one repeat."""
    taking(lambda name, number: 1.0 if name == "plain" else 4.5 if 3 <= number < 6 else 0.5)
    plain, whole, _ = run()
    assert (plain.lowest, plain.tokens_per_second, plain.highest) == (9, 9, 9)
    assert (whole.lowest, whole.tokens_per_second, whole.highest) == (2, 18, 18)
    assert (whole.speedup.value, whole.speedup.low, whole.speedup.high) == (2, 2, 2)


def test_a_method_with_another_output_is_marked_and_never_recommended(run, taking, model):
    plain = layerskip_method("plain", EagerEngine(model), None)

    def shifted(prompt, most):
        decoded = plain.decode(prompt, most)
        return replace(decoded, tokens=tuple((token + 1) % model.vocab_size for token in decoded.tokens))

    taking(lambda name, number: 1.0 if name == "plain" else 0.5)
    entries = run([plain, DecodingMethod("wrong", shifted)])
    assert [one.different for one in entries] == [0, 3]
    assert entries[1].speedup.low == 2
    assert not entries[1].pays
    assert Comparison("m", "d", "t", "e", {}, 3, 9, entries, {}).best is None


def test_every_prompt_is_counted_when_all_have_decoded_it(run):
    counted = []
    run(repeats=2, on_prompt=counted.append)
    assert counted == [1, 2, 3, 4, 5, 6]


def test_each_method_goes_first_equally_often(run, taking):
    names = []
    taking(lambda name, number: names.append(name) or 1.0)
    run(repeats=3)
    assert sorted(names[::3]) == sorted(["plain", "whole", "theirs"] * 3)
    assert all(len(set(names[turn : turn + 3])) == 3 for turn in range(0, 27, 3))


def failing(prompt, most):
    raise TypeError("no such cache\nsecond line")


def test_anothers_code_that_fails_is_left_out_with_its_reason(model):
    broken = DecodingMethod("broken", failing, third_party=True)
    some = methods(model)
    assert usable_methods([*some, broken], PROMPTS[0]) == (some, {"broken": "TypeError: no such cache"})


def test_an_error_of_layerskips_own_is_one(model):
    with pytest.raises(TypeError, match="no such cache"):
        usable_methods([DecodingMethod("broken", failing)], PROMPTS[0])
