"""Measuring: equal outputs, what is excused as a near-tie, and the figures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.drafter import LayerSkipDrafter
from layerskip.errors import LosslessnessError
from search.measure import PromptMeasurement, measure_prompt, parts_at_near_tie, summarize
from tests.models import LAYERS, VOCABULARY, tiny_llama
from tests.search.searches import encoded_prompt, ratio, widths_disagree
from tests.strategies import draft_exits, skip_sets, tokens

PROMPT = encoded_prompt("p", [3, 1, 4, 1, 5])


class CountingDrafter(LayerSkipDrafter):
    """Notes how many forward passes the model has made when a generation with it starts."""

    def __init__(self, model):
        self.passes = 0
        model.hf_model.model.norm.register_forward_hook(self._count)
        super().__init__(model, SkipSet(model.num_layers), FixedLength(2))

    def _count(self, *_):
        self.passes += 1

    def start(self, prompt, states):
        super().start(prompt, states)
        self.passes_before = self.passes - 1  # the prompt's own


def with_head_row(new, like, scale=1.0, **settings):
    """A tiny model in which one token's logit is ``scale`` times another's, whatever the text."""
    hf_model = tiny_llama(tie_word_embeddings=False, **settings)
    with torch.no_grad():
        hf_model.lm_head.weight[new] = scale * hf_model.lm_head.weight[like]
    return LayerSkipModel(hf_model)


def greedy(model, prompt=PROMPT, count=6):
    return generate(model, prompt.tokens, max_new_tokens=count).tokens


@given(prompt=tokens(12), skip_set=skip_sets(), draft_exit=draft_exits(), count=st.integers(1, 8), first=st.booleans())
@settings(max_examples=30)
def test_any_candidate_is_measured_on_the_same_tokens(gemma2, prompt, skip_set, draft_exit, count, first):
    drafter = LayerSkipDrafter(gemma2, skip_set, draft_exit)
    measured = measure_prompt(gemma2, encoded_prompt("p", prompt), drafter, max_new_tokens=count, plain_first=first)
    assert measured.prompt == "p"
    assert measured.tokens == measured.draft_tokens == count
    assert not measured.near_tie
    assert 0 <= measured.accepted <= measured.drafted
    assert (measured.drafted == 0) == (count <= 2)  # the first token comes from prefill, the last is never drafted
    assert measured.plain_seconds > 0
    assert measured.draft_seconds > 0


@pytest.mark.parametrize("plain_first", [True, False])
def test_the_order_of_plain_and_self_speculative_decoding_can_be_chosen(plain_first):
    model = LayerSkipModel(tiny_llama())
    drafter = CountingDrafter(model)
    measure_prompt(model, PROMPT, drafter, max_new_tokens=4, plain_first=plain_first)
    assert drafter.passes > drafter.passes_before
    assert drafter.passes_before == (4 if plain_first else 0)


def test_a_text_that_ends_early_is_measured_to_its_end():
    hf_model = tiny_llama()
    model = LayerSkipModel(hf_model)
    hf_model.generation_config.eos_token_id = greedy(model)[2]
    ended = greedy(model, count=20)
    drafter = LayerSkipDrafter(model, SkipSet(LAYERS, attention=(1,)), FixedLength(4))
    measured = measure_prompt(model, PROMPT, drafter, max_new_tokens=20, plain_first=True)
    assert measured.tokens == measured.draft_tokens == len(ended) <= 3


def test_a_model_whose_wide_passes_differ_is_found_out():
    model = LayerSkipModel(tiny_llama())
    drafter = LayerSkipDrafter(model, SkipSet(LAYERS), FixedLength(3))
    with widths_disagree(model), pytest.raises(LosslessnessError) as caught:
        measure_prompt(model, PROMPT, drafter, max_new_tokens=8, plain_first=True)
    assert str(caught.value).startswith("prompt p: ")
    assert "bug" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(text=tokens(6))
@settings(max_examples=20)
def test_equal_outputs_do_not_part(llama, text):
    assert parts_at_near_tie(llama, PROMPT, text, list(text)) is False


def test_outputs_that_part_where_two_best_tokens_tie_part_at_a_near_tie():
    best = greedy(LayerSkipModel(tiny_llama()))
    twin = next(token for token in range(VOCABULARY) if token not in best)
    for at in range(len(best)):
        model = with_head_row(twin, best[at])
        plain = [*best[:at], best[at], 1, 2]
        draft = [*best[:at], twin, 2, 1]  # behind the parting, each goes its own way
        assert parts_at_near_tie(model, PROMPT, plain, draft) is True
        assert parts_at_near_tie(model, PROMPT, draft, plain) is True


def test_outputs_that_part_anywhere_else_are_a_bug():
    model = LayerSkipModel(tiny_llama())
    best = greedy(model)
    for at in range(len(best)):
        wrong = [*best[:at], (best[at] + 1) % VOCABULARY, *best[at + 1 :]]
        with pytest.raises(LosslessnessError, match=f"left plain decoding at token {at} "):
            parts_at_near_tie(model, PROMPT, best, wrong)


def test_an_output_that_is_the_beginning_of_the_other_is_a_bug(llama):
    best = greedy(llama)
    for plain, draft in [(best, best[:3]), (best[:3], best), (best, []), ([], best)]:
        with pytest.raises(LosslessnessError, match=r"prompt p: .* at token end "):
            parts_at_near_tie(llama, PROMPT, plain, draft)


def others(best):
    """Two tokens that are not the best one."""
    return [token for token in range(3) if token != best][:2]


def test_two_tokens_that_tie_below_the_best_are_no_excuse():
    [best] = greedy(LayerSkipModel(tiny_llama()), count=1)
    one, other = others(best)
    model = with_head_row(other, one)
    assert greedy(model, count=1) == [best]
    with pytest.raises(LosslessnessError):
        parts_at_near_tie(model, PROMPT, [one], [other])


def test_a_tie_with_the_best_token_is_no_excuse_for_a_third_one():
    [best] = greedy(LayerSkipModel(tiny_llama()), count=1)
    twin, third = others(best)
    model = with_head_row(twin, best)
    assert parts_at_near_tie(model, PROMPT, [best], [twin])
    for excused in (best, twin):
        with pytest.raises(LosslessnessError):
            parts_at_near_tie(model, PROMPT, [excused], [third])


@pytest.mark.parametrize(("dtype", "excused"), [(torch.bfloat16, True), (torch.float32, False)])
def test_what_counts_as_a_tie_depends_on_how_far_the_type_rounds(dtype, excused):
    """One percent is within bfloat16's rounding (a unit in the last place is 0.8 %), and far beyond float32's."""
    [best] = greedy(LayerSkipModel(tiny_llama().to(dtype)), count=1)
    second = others(best)[0]
    model = with_head_row(second, best, scale=0.99)
    model.hf_model.to(dtype)
    if excused:
        assert parts_at_near_tie(model, PROMPT, [best], [second])
    else:
        with pytest.raises(LosslessnessError):
            parts_at_near_tie(model, PROMPT, [best], [second])


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
    return st.lists(st.builds(PromptMeasurement, **fields | fixed), min_size=1, max_size=12)


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
    agreeing = [
        PromptMeasurement("p", speedup * m.draft_seconds, m.draft_seconds, 10, 10, 1, 1, False) for m in measured
    ]
    summary = summarize(agreeing)
    for value in (summary.speedup, summary.speedup_low, summary.speedup_high):
        assert math.isclose(value, speedup, rel_tol=1e-9)


def test_prompts_that_disagree_leave_an_interval_of_some_width():
    measured = [PromptMeasurement("p", seconds, 1.0, 10, 10, 1, 1, False) for seconds in (1.0, 2.0, 3.0)]
    summary = summarize(measured)
    assert summary.speedup_low < summary.speedup < summary.speedup_high
