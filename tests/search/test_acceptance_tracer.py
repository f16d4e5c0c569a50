"""Teacher-forced traces, held against real draft steps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import SkipSet
from layerskip.drafting.bridges import Bridge
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine
from search.acceptance_tracer import AcceptanceTracer
from search.reference import record
from search.traces import acceptance
from tests.models import LAYERS, NEAR_TIE, VOCABULARY
from tests.search.traces import stack_trace
from tests.strategies import skip_sets, tokens

texts = st.lists(st.tuples(tokens(12), tokens(7)), min_size=1, max_size=6)
vocabularies = st.none() | st.sets(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20).map(sorted)


def references(model, drawn):
    return [record(model, prompt, new) for prompt, new in drawn]


def all_traces(estimator, stack):
    return [trace for part in estimator.trace(stack) for trace in part]


def bridges(skip_set, seed):
    """An arbitrary affine map for every second run of skipped sublayers."""
    source = torch.Generator().manual_seed(seed)
    made, mask = [], [*skip_set.mask, False]
    starts = [i for i in range(2 * LAYERS) if mask[i] and not (i and mask[i - 1])]
    for start in starts[::2]:
        weight, bias = (torch.randn(shape, generator=source) * 0.1 for shape in ((32, 32), (32,)))
        made.append(Bridge(start, mask.index(False, start), [weight], bias))
    return made


@torch.inference_mode()
def real_draft_steps(model, stack, text):
    """The draft's logits at each position at which it is asked, by a draft step behind the target model's own past."""
    found = []
    for position in range(text.prompt_length, len(text.tokens) - 1):
        engine = EagerEngine(model)
        cache = engine.new_cache(len(text.tokens))
        engine.prefill(text.tokens[:position], cache)
        context = model.pass_context(1, cache)
        x = stack.run(model.embed(text.tokens[position : position + 1]), context)
        step = engine.draft_step(text.tokens[position : position + 1], cache, stack)
        found.append((model.logits(x, stack)[0], step))
    return found


def check(model, stack, text, trace):
    assert (trace.prompt_length, trace.new_tokens) == (text.prompt_length, text.new_tokens)
    assert np.array_equal(trace.target_confidence, text.confidence.numpy())
    assert len(trace.agrees) == trace.confidence.shape[1] == text.new_tokens - 1
    for position, (logits, step) in enumerate(real_draft_steps(model, stack, text)):
        assert abs(float(step.confidence) - trace.confidence[0, position]) < 1e-3
        best = logits.topk(min(2, len(logits))).values
        if len(best) == 1 or best[0] - best[1] > NEAR_TIE:
            proposed = int(logits.argmax()) if stack.token_ids is None else int(stack.token_ids[logits.argmax()])
            assert trace.agrees[position] == (proposed == int(text.choices[position]))


@given(drawn=texts, skip_set=skip_sets(), vocabulary=vocabularies, bridged=st.none() | st.integers(0, 99))
@settings(max_examples=30)
def test_a_trace_says_at_every_position_what_a_real_draft_step_says_there(tiny, drawn, skip_set, vocabulary, bridged):
    stand_ins = DraftWeights(bridges=() if bridged is None else bridges(skip_set, bridged)).steps
    token_ids = None if vocabulary is None else torch.tensor(vocabulary)
    stack = tiny.stack_of(skip_set, stand_ins=stand_ins, token_ids=token_ids)
    written = references(tiny, drawn)
    traces = all_traces(AcceptanceTracer(tiny, written), stack)
    for text, trace in zip(written, traces, strict=True):
        check(tiny, stack, text, trace)


@given(drawn=texts, skip_set=skip_sets())
@settings(max_examples=10)
def test_texts_need_not_stay_in_memory(gemma2, drawn, skip_set):
    written, stack = references(gemma2, drawn), gemma2.stack_of(skip_set)
    resident, read_anew = AcceptanceTracer(gemma2, written), AcceptanceTracer(gemma2, written, memory=0)
    for _ in range(2):  # the second time, from what stayed
        for one, other in zip(all_traces(resident, stack), all_traces(read_anew, stack), strict=True):
            assert np.array_equal(one.agrees, other.agrees)
            assert np.array_equal(one.confidence, other.confidence)
    assert resident._resident
    assert not read_anew._resident


@given(drawn=texts, skip_set=skip_sets(), other=skip_sets())
@settings(max_examples=10)
def test_what_one_draft_computed_does_not_show_in_the_next(gemma2, drawn, skip_set, other):
    written = references(gemma2, drawn)
    used = AcceptanceTracer(gemma2, written)
    all_traces(used, gemma2.stack_of(other))
    stack = gemma2.stack_of(skip_set)
    for one, fresh in zip(all_traces(used, stack), all_traces(AcceptanceTracer(gemma2, written), stack), strict=True):
        assert np.array_equal(one.confidence, fresh.confidence)


def test_below_its_first_skipped_sublayer_a_draft_is_not_computed_again(llama):
    estimator = AcceptanceTracer(llama, references(llama, [([1, 2, 3], [4, 5, 6])]))
    ran = []
    handles = [layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(_layers(llama))]
    try:
        list(estimator.trace(llama.stack_of(SkipSet(LAYERS, attention=(2,)))))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [2, 3]


def _layers(model):
    return model.hf_model.model.layers


@given(st.lists(tokens(7), min_size=1, max_size=9))
@settings(max_examples=10)
def test_a_draft_that_skips_nothing_always_agrees(llama, prompts):
    written = [record(llama, prompt, [1, 2, 3]) for prompt in prompts]
    traces = all_traces(AcceptanceTracer(llama, written), llama.stack_of(SkipSet(LAYERS)))
    assert acceptance(traces) == 1
    for trace in traces:
        assert np.allclose(trace.confidence[0], trace.target_confidence)


def test_a_few_texts_come_first_and_all_of_them_in_the_end(llama):
    written = [record(llama, [number], [1, 2]) for number in range(15)]
    parts = list(AcceptanceTracer(llama, written).trace(llama.stack_of(SkipSet(LAYERS, mlp=(1,)))))
    assert [len(part) for part in parts] == [4, 8, 3]
    assert AcceptanceTracer(llama, written).num_texts == 15
    seen = [trace.target_confidence for part in parts for trace in part]
    assert all(np.array_equal(c, t.confidence.numpy()) for c, t in zip(seen, written, strict=True))


def test_texts_of_one_token_ask_for_no_draft(tiny):
    [trace] = all_traces(AcceptanceTracer(tiny, [record(tiny, [1, 2], [3])]), tiny.stack_of(SkipSet(LAYERS, mlp=(0,))))
    assert len(trace.agrees) == 0
    assert acceptance([trace]) == 1


@given(st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=4))
def test_acceptance_is_the_share_of_all_positions(agreements):
    traces = [stack_trace([not one for one in a]) for a in agreements]
    positions = [one for a in agreements for one in a]
    assert acceptance(traces) == pytest.approx(sum(positions) / len(positions) if positions else 1)


def test_a_text_can_be_taken_through_the_stack_in_several_versions(tiny):
    versions = AcceptanceTracer(tiny, [record(tiny, [1, 2, 3], [4, 5, 6, 7])]).sublayer_runner()
    assert versions.states.shape == (2 * LAYERS + 1, 3, 32)
    for index in range(2 * LAYERS):
        before = versions.states[index]
        after = versions.run_sublayer(index, torch.stack([before, 2 * before]))
        assert torch.allclose(after[0], versions.states[index + 1], atol=1e-4)
        assert not torch.allclose(after[1], after[0])
