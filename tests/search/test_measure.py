"""Measuring: interleaving, equal outputs, what is excused as a near-tie, and the figures."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import EagerEngine
from layerskip.errors import LosslessnessError
from search.decoding_methods import Decoded
from search.machine_lock import MachineLock
from search.measure import (
    Measurement,
    MeasuringPlan,
    TimedRun,
    diverges_at_near_tie,
    mean_accepted_length,
    measure_drafters,
    summarize,
    timed,
)
from tests.models import LAYERS, VOCABULARY, tiny_llama
from tests.search.searches import encoded_prompt, ratio, widths_disagree
from tests.strategies import draft_exits, skip_sets, tokens

PROMPT = encoded_prompt("p", [3, 1, 4, 1, 5])
PROMPTS = [encoded_prompt("a", [3, 1, 4]), encoded_prompt("b", [1, 5, 9, 2]), encoded_prompt("c", [6])]


@pytest.fixture(scope="module")
def lock(tmp_path_factory):
    return MachineLock(tmp_path_factory.mktemp("lock"), torch.device("cpu"))


@pytest.fixture
def model():
    return LayerSkipModel(tiny_llama())


@pytest.fixture
def run(model, lock):
    """Measures a drafter; gives what was measured after each prompt."""

    def measure(drafter=None, prompts=PROMPTS, *, max_new_tokens=12, repeats=3, expected=None, known_plain=None):
        drafter = drafter or LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (2,)), stopping=FixedLength(3)))
        plan = MeasuringPlan(prompts, max_new_tokens, repeats, expected or {}, known_plain or {})
        return [m["draft"] for m in measure_drafters(EagerEngine(model), {"draft": drafter}, plan, lock)]

    return measure


@pytest.fixture
def changed(monkeypatch):
    """Let every run be changed before it counts."""

    def change(changing):
        def changed_run(model, method, *rest):
            return changing(method.name, timed(model, method, *rest))

        monkeypatch.setattr("search.measure.timed", changed_run)

    return change


def measure_one(model, drafter, lock, *, prompt=PROMPT, max_new_tokens):
    plan = MeasuringPlan([prompt], max_new_tokens)
    [measured] = measure_drafters(EagerEngine(model), {"draft": drafter}, plan, lock)
    return measured["draft"]


def with_head_row(new, like, scale=1.0, **settings):
    """A tiny model in which one token's logit is ``scale`` times another's, whatever the text."""
    hf_model = tiny_llama(tie_word_embeddings=False, **settings)
    with torch.no_grad():
        hf_model.lm_head.weight[new] = scale * hf_model.lm_head.weight[like]
    return LayerSkipModel(hf_model)


def greedy(model, prompt=PROMPT, count=6):
    return generate(model, prompt.tokens, max_new_tokens=count).tokens


@given(prompt=tokens(12), skip_set=skip_sets(), draft_exit=draft_exits(), count=st.integers(1, 8))
@settings(max_examples=30)
def test_any_candidate_is_measured_on_the_same_tokens(gemma2, lock, prompt, skip_set, draft_exit, count):
    drafter = LayerSkipDrafter(gemma2, DraftConfig(skip_set, stopping=draft_exit))
    clock = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.measure.device_seconds", lambda device: next(clock))
        measured = measure_one(gemma2, drafter, lock, prompt=encoded_prompt("p", prompt), max_new_tokens=count)
    assert measured.prompt == "p"
    assert measured.tokens == measured.draft_tokens == count
    assert not measured.near_tie
    assert 0 <= measured.accepted <= measured.drafted
    assert (measured.drafted == 0) == (count <= 2)  # the first token comes from prefill, the last is never drafted
    assert (measured.plain_seconds, measured.draft_seconds) == (1, 1)  # by a clock that each look at it advances


@pytest.fixture
def calls(monkeypatch):
    """The runs so far, as (prompt, method)."""
    calls = []

    def noted(model, method, prompt, *rest):
        calls.append((prompt.id, method.name))
        return timed(model, method, prompt, *rest)

    monkeypatch.setattr("search.measure.timed", noted)
    return calls


@pytest.fixture
def quiet(changed):
    """A machine on which every run takes the same time."""
    changed(lambda name, run: replace(run, seconds=1.0))


def test_every_prompt_is_decoded_both_ways_as_often_as_asked_and_in_turn(run, changed):
    calls = []
    changed(lambda name, one: calls.append(name) or replace(one, seconds=1.0))
    assert [measured.prompt for measured in run(repeats=2)] == ["a", "b", "c"] * 2
    turns = list(zip(calls[::2], calls[1::2], strict=True))
    assert len(turns) == 6
    assert {frozenset(turn) for turn in turns} == {frozenset(("plain decoding", "draft"))}
    assert {first for first, _ in turns[::3]} == {"plain decoding", "draft"}


def test_plain_decoding_and_the_draft_take_turns_in_who_goes_first(run, changed):
    calls = []
    changed(lambda name, one: calls.append(name) or replace(one, seconds=1.0))
    run(repeats=1, expected={name: dict.fromkeys("abc", 1.0) for name in ("plain decoding", "draft")})
    assert calls[::2] == ["plain decoding", "draft", "plain decoding"]


def test_nothing_is_decoded_ahead_of_what_was_asked_for(model, lock, calls):
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (2,)), stopping=FixedLength(3)))
    next(measure_drafters(EagerEngine(model), {"draft": drafter}, MeasuringPlan(PROMPTS, 4, repeats=2), lock))
    assert calls == [("a", "plain decoding"), ("a", "draft")]


def runs_taking(changed, *, plain, draft):
    """Let the runs of each method take so many seconds, one after the other."""
    seconds = {"plain decoding": iter(plain), "draft": iter(draft)}
    changed(lambda name, one: replace(one, seconds=next(seconds[name])))


def test_a_prompt_counts_with_the_fastest_of_its_repeats(run, changed):
    runs_taking(changed, plain=[4.0, 4.0, 4.0], draft=[2.0, 9.0, 2.1])
    after_each = run(prompts=PROMPTS[:1])
    assert [len(measured.plain) for measured in after_each] == [len(measured.draft) for measured in after_each]
    assert [(m.plain_seconds, m.draft_seconds) for m in after_each] == [(4.0, 2.0)] * 3
    assert not after_each[-1].disturbed
    assert summarize(after_each[-1:]).speedup == 2.0


@pytest.mark.parametrize(
    ("plain", "draft", "expected", "runs"),
    [
        ([4.0, 4.1], [2.0, 2.1], {}, 2),  # two runs agree
        ([4.0, 4.1, 4.0], [9.0, 2.0, 2.1], {}, 3),  # not before the third
        ([4.0], [2.0], {"plain decoding": {"a": 4.1}, "draft": {"a": 1.9}}, 1),  # as expected
        ([4.0, 4.1], [2.0, 2.1], {"plain decoding": {"a": 4.1}, "draft": {"a": 1.0}}, 2),  # slower, but certainly
        ([9.0, 4.0, 4.0], [2.0, 2.1, 2.0], {"plain decoding": {"a": 4.0}}, 2),
    ],
)
def test_a_prompt_is_decoded_until_its_times_are_confirmed(run, changed, plain, draft, expected, runs):
    runs_taking(changed, plain=plain, draft=draft)
    [measured] = run(prompts=PROMPTS[:1], repeats=1, expected=expected)
    assert (max(len(measured.plain), len(measured.draft)), measured.disturbed) == (runs, False)


def test_times_that_are_never_confirmed_are_uncertain(run, changed):
    runs_taking(changed, plain=[1.0] * 4, draft=[1.0, 2.0, 4.0, 8.0])
    [measured] = run(prompts=PROMPTS[:1], repeats=1)
    assert measured.disturbed
    assert summarize([measured]).disturbed == 1


def test_known_runs_of_plain_decoding_count_for_all_prompts_but_the_first(run, changed, model):
    calls = []
    seconds = {"plain decoding": 4.0, "draft": 2.0}
    changed(lambda name, one: calls.append(name) or replace(one, seconds=seconds[name]))
    known = {m.prompt: m.plain for m in run(repeats=2)}
    calls.clear()
    expected = {name: dict.fromkeys("abc", taken) for name, taken in seconds.items()}
    measured = run(repeats=1, expected=expected, known_plain=known)
    assert sorted(calls) == ["draft"] * 3 + ["plain decoding"]
    assert [(m.plain_seconds, m.draft_seconds) for m in measured] == [(4.0, 2.0)] * 3

    calls.clear()
    seconds["plain decoding"] = 5.0  # the machine has become slower
    measured = run(repeats=1, expected=expected, known_plain=known)
    assert {m.plain_seconds for m in measured} == {5.0}
    assert not any(m.disturbed for m in measured)


def test_all_drafters_are_measured_against_the_same_runs_of_plain_decoding(model, lock):
    drafters = {
        name: LayerSkipDrafter(model, DraftConfig(skip_set))
        for name, skip_set in (("x", SkipSet(LAYERS, (2,))), ("y", SkipSet(LAYERS)))
    }
    for measured in measure_drafters(EagerEngine(model), drafters, MeasuringPlan(PROMPTS, 8), lock):
        assert list(measured) == ["x", "y"]
        assert measured["x"].plain == measured["y"].plain
        assert measured["x"].draft != measured["y"].draft


@pytest.mark.usefixtures("quiet")
def test_accepted_tokens_are_counted_by_the_round(run, model):
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS), stopping=FixedLength(3)))
    measured = run(drafter, repeats=1)
    stats = [generate(model, prompt.tokens, drafter=drafter, max_new_tokens=12).stats for prompt in PROMPTS]
    assert mean_accepted_length(measured) == sum(s.accepted for s in stats) / sum(s.rounds for s in stats)
    assert summarize(measured).acceptance_rate == 1


def test_one_token_takes_no_round(run):
    assert mean_accepted_length(run(max_new_tokens=1)) is None


def test_a_draft_that_changes_the_text_is_an_error(run, changed, model):
    def other(name, one):
        tokens = tuple((token + 1) % model.vocab_size for token in one.decoded.tokens)
        return replace(one, decoded=replace(one.decoded, tokens=tokens)) if name == "draft" else one

    changed(other)
    with pytest.raises(LosslessnessError):
        run(repeats=1)


def test_a_text_that_ends_early_is_measured_to_its_end(lock):
    hf_model = tiny_llama()
    model = LayerSkipModel(hf_model)
    hf_model.generation_config.eos_token_id = greedy(model)[2]
    ended = greedy(model, count=20)
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, attention=(1,)), stopping=FixedLength(4)))
    measured = measure_one(model, drafter, lock, max_new_tokens=20)
    assert measured.tokens == measured.draft_tokens == len(ended) <= 3


def test_a_model_whose_wide_passes_differ_is_found_out(model, lock):
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS), stopping=FixedLength(3)))
    with widths_disagree(model), pytest.raises(LosslessnessError) as caught:
        measure_one(model, drafter, lock, max_new_tokens=8)
    assert str(caught.value).startswith("prompt p: ")
    assert "bug" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(text=tokens(6))
@settings(max_examples=20)
def test_equal_outputs_do_not_diverge(llama, text):
    assert diverges_at_near_tie(llama, PROMPT, text, list(text)) is False


def test_outputs_that_diverge_where_two_best_tokens_tie_diverge_at_a_near_tie():
    best = greedy(LayerSkipModel(tiny_llama()))
    twin = next(token for token in range(VOCABULARY) if token not in best)
    for at in range(len(best)):
        model = with_head_row(twin, best[at])
        plain = [*best[:at], best[at], 1, 2]
        draft = [*best[:at], twin, 2, 1]  # after diverging, each goes its own way
        assert diverges_at_near_tie(model, PROMPT, plain, draft) is True
        assert diverges_at_near_tie(model, PROMPT, draft, plain) is True


def test_outputs_that_diverge_anywhere_else_are_a_bug():
    model = LayerSkipModel(tiny_llama())
    best = greedy(model)
    for at in range(len(best)):
        wrong = [*best[:at], (best[at] + 1) % VOCABULARY, *best[at + 1 :]]
        with pytest.raises(LosslessnessError, match=f"diverges from plain decoding at token {at} "):
            diverges_at_near_tie(model, PROMPT, best, wrong)


def test_an_output_that_is_the_beginning_of_the_other_is_a_bug(llama):
    best = greedy(llama)
    for plain, draft in [(best, best[:3]), (best[:3], best), (best, []), ([], best)]:
        with pytest.raises(LosslessnessError, match=r"prompt p: .* at token end "):
            diverges_at_near_tie(llama, PROMPT, plain, draft)


def others(best):
    """Two tokens that are not the best one."""
    return [token for token in range(3) if token != best][:2]


def test_two_tokens_that_tie_below_the_best_are_no_excuse():
    [best] = greedy(LayerSkipModel(tiny_llama()), count=1)
    one, other = others(best)
    model = with_head_row(other, one)
    assert greedy(model, count=1) == [best]
    with pytest.raises(LosslessnessError):
        diverges_at_near_tie(model, PROMPT, [one], [other])


def test_a_tie_with_the_best_token_is_no_excuse_for_a_third_one():
    [best] = greedy(LayerSkipModel(tiny_llama()), count=1)
    twin, third = others(best)
    model = with_head_row(twin, best)
    assert diverges_at_near_tie(model, PROMPT, [best], [twin])
    for excused in (best, twin):
        with pytest.raises(LosslessnessError):
            diverges_at_near_tie(model, PROMPT, [excused], [third])


@pytest.mark.parametrize(("dtype", "excused"), [(torch.bfloat16, True), (torch.float32, False)])
def test_what_counts_as_a_tie_depends_on_how_far_the_type_rounds(dtype, excused):
    """One percent is within bfloat16's rounding (a unit in the last place is 0.8 %), and far beyond float32's."""
    [best] = greedy(LayerSkipModel(tiny_llama().to(dtype)), count=1)
    second = others(best)[0]
    model = with_head_row(second, best, scale=0.99)
    model.hf_model.to(dtype)
    if excused:
        assert diverges_at_near_tie(model, PROMPT, [best], [second])
    else:
        with pytest.raises(LosslessnessError):
            diverges_at_near_tie(model, PROMPT, [best], [second])


def measurement(prompt, plain_seconds, draft_seconds, tokens, draft_tokens, drafted, accepted, near_tie):
    plain, draft = (
        TimedRun(Decoded((0,) * count, count, drafted, accepted, 0.0, None), seconds)
        for count, seconds in ((tokens, plain_seconds), (draft_tokens, draft_seconds))
    )
    return Measurement(prompt, (plain,), (draft,), near_tie)


def measurements(**fixed):
    seconds = st.floats(0.01, 10)
    fields = {
        "prompt": st.text("ab", min_size=1, max_size=3),
        "plain_seconds": seconds,
        "draft_seconds": seconds,
        "tokens": st.integers(1, 100),
        "draft_tokens": st.integers(1, 100),
        "drafted": st.integers(20, 40),
        "accepted": st.integers(0, 20),
        "near_tie": st.booleans(),
    }
    return st.lists(st.builds(measurement, **fields | fixed), min_size=1, max_size=12)


@given(measurements())
@settings(max_examples=60)
def test_a_summary_takes_all_prompts_together(measured):
    summary = summarize(measured)
    assert math.isclose(summary.speedup, ratio(measured))
    assert math.isclose(summary.speedup, summary.draft_tokens_per_second / summary.plain_tokens_per_second)
    plain_seconds, draft_seconds = sum(m.plain_seconds for m in measured), sum(m.draft_seconds for m in measured)
    assert math.isclose(summary.plain_tokens_per_second, sum(m.tokens for m in measured) / plain_seconds)
    assert math.isclose(summary.draft_tokens_per_second, sum(m.draft_tokens for m in measured) / draft_seconds)
    assert math.isclose(summary.acceptance_rate, sum(m.accepted for m in measured) / sum(m.drafted for m in measured))
    assert summary.prompts == len(measured)
    assert summary.near_ties == sum(m.near_tie for m in measured)


@given(measurements())
@settings(max_examples=60)
def test_the_interval_contains_the_speedup_and_lies_between_the_extremes(measured):
    summary = summarize(measured)
    rounding = 1 + 1e-9
    assert summary.speedup_low <= summary.speedup * rounding
    assert summary.speedup <= summary.speedup_high * rounding
    plain = [m.plain_seconds / m.tokens for m in measured]
    draft = [m.draft_seconds / m.draft_tokens for m in measured]
    assert min(plain) / max(draft) <= summary.speedup_low * rounding
    assert summary.speedup_high <= max(plain) / min(draft) * rounding


@given(measurements())
@settings(max_examples=30)
def test_the_same_measurements_give_the_same_summary(measured):
    assert summarize(measured) == summarize(list(measured))


@given(measurements())
def test_one_prompt_has_its_own_speedup_and_no_interval_around_it(measured):
    summary = summarize(measured[:1])
    assert math.isclose(summary.speedup, measured[0].speedup)
    assert summary.speedup_low == summary.speedup == summary.speedup_high


@given(measurements(drafted=st.just(0), accepted=st.just(0)))
@settings(max_examples=30)
def test_where_nothing_was_drafted_there_is_no_acceptance_rate(measured):
    assert summarize(measured).acceptance_rate is None


@given(st.floats(0.1, 10), measurements(tokens=st.just(10), draft_tokens=st.just(10)))
@settings(max_examples=30)
def test_prompts_that_agree_leave_an_interval_of_no_width(speedup, measured):
    agreeing = [measurement("p", speedup * m.draft_seconds, m.draft_seconds, 10, 10, 1, 1, False) for m in measured]
    summary = summarize(agreeing)
    for value in (summary.speedup, summary.speedup_low, summary.speedup_high):
        assert math.isclose(value, speedup, rel_tol=1e-9)


def test_prompts_that_disagree_leave_an_interval_of_some_width():
    measured = [measurement("p", seconds, 1.0, 10, 10, 1, 1, False) for seconds in (1.0, 2.0, 3.0)]
    summary = summarize(measured)
    assert summary.speedup_low < summary.speedup < summary.speedup_high
