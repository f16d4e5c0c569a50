"""Traces of drafts that remember the text, held against what decoding with them proposes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet
from layerskip.drafting.layer_skip import LayerSkipDrafter, RoundResult
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine
from layerskip.sampling import Draft, GreedySampler, Verdict
from search.acceptance import AcceptanceTracer
from search.reference import record
from search.train_draft import trace_of
from tests.models import LAYERS, NEAR_TIE, VOCABULARY, random_layers, tiny_gemma2
from tests.search.test_acceptance import all_traces, bridges, references
from tests.strategies import tokens

TOP = 2 * LAYERS
texts = st.lists(st.tuples(tokens(9), tokens(7)), min_size=1, max_size=5)


class Watched(GreedySampler):
    """Keeps the draft steps that it chose by."""

    def __init__(self):
        self.steps = []

    def draft(self, step, token_ids, count=1, *, path=None):
        self.steps.append(step)
        return super().draft(step, token_ids, count, path=path)


@torch.inference_mode()
def proposals(model, drafter, text):
    """What decoding is proposed at each position of a text at which drafts are asked, whatever it had said before."""
    tokens = text.tokens
    engine = EagerEngine(model)
    cache = engine.new_cache(len(tokens) + 8)
    scored = engine.prefill(tokens[: text.prompt_length], cache)
    drafter.start(engine, tokens[: text.prompt_length], scored.states[-1])
    sampler = Watched()
    for position in range(text.prompt_length, len(tokens) - 1):
        newest = tokens[position : position + 1]
        drafter.propose(newest, cache, 1, sampler)
        cache.rollback(position)
        scored = engine.verify(newest, cache)
        # What was proposed is taken to have been wrong, so that every position is the newest once.
        verdict = Verdict([int(tokens[position + 1])], tokens[position + 1 : position + 2], (0,))
        drafter.observe(RoundResult(Draft.of([], newest.device), verdict, newest, scored))
    return sampler.steps


def check(model, drafter, text, trace):
    steps = proposals(model, drafter, text)
    assert len(steps) == len(trace.agrees) == text.new_tokens - 1
    ids = drafter._stack.token_ids
    for step, choice, agrees, confidence in zip(steps, text.choices, trace.agrees, trace.confidence, strict=True):
        assert abs(float(step.confidence) - confidence) < 1e-3
        best = step.logits.topk(min(2, len(step.logits))).values
        if len(best) == 1 or best[0] - best[1] > NEAR_TIE:
            proposed = int(step.logits.argmax()) if ids is None else int(ids[step.logits.argmax()])
            assert agrees == (proposed == int(choice))


@given(
    drawn=texts,
    start=st.integers(1, TOP - 1),
    below=st.lists(st.booleans(), min_size=TOP, max_size=TOP),
    like=st.integers(0, LAYERS - 1),
    bridged=st.booleans(),
    vocabulary=st.none() | st.sets(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20).map(sorted),
)
@settings(max_examples=30)
def test_a_trace_says_at_every_position_what_decoding_is_proposed_there(
    tiny, drawn, start, below, like, bridged, vocabulary
):
    below = [skip and index < start for index, skip in enumerate(below)]
    below[0] &= not all(below[:start])
    layers = random_layers(tiny, {start: TOP}, like=like)
    skip_set = SkipSet.from_mask([skip or index >= start for index, skip in enumerate(below)])
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    fitted = bridges(SkipSet.from_mask(below), 1) if bridged else []
    drafter = LayerSkipDrafter(
        tiny, DraftConfig(skip_set, stopping=FixedLength(1)), DraftWeights(bridges=fitted, layers=layers, token_ids=ids)
    )
    written = references(tiny, drawn)
    traces = all_traces(AcceptanceTracer(tiny, written), drafter._stack)
    for text, trace in zip(written, traces, strict=True):
        check(tiny, drafter, text, trace)


def test_what_is_left_out_below_the_exit_shows_in_what_is_remembered(llama):
    """Otherwise the test above would prove little."""
    [text] = references(llama, [([1, 5, 7, 2], [4, 4, 9, 3, 8, 1])])
    layers = random_layers(llama, {4: TOP})
    found = []
    for attention in ((2, 3), (1, 2, 3)):
        skip_set = SkipSet(LAYERS, attention, (2, 3))
        drafter = LayerSkipDrafter(llama, DraftConfig(skip_set, stopping=FixedLength(1)), DraftWeights(layers=layers))
        [trace] = all_traces(AcceptanceTracer(llama, [text]), drafter._stack)
        found.append(trace.confidence)
    assert np.abs(found[0] - found[1]).max() > 1e-2


@pytest.mark.parametrize(
    "make", [lambda llama: llama, lambda _: LayerSkipModel(tiny_gemma2())], ids=["llama", "gemma2"]
)
def test_where_nothing_is_left_out_below_the_exit_it_is_the_trace_that_tuning_makes(llama, make):
    model = make(llama)
    written = references(model, [([1, 5, 7], [4, 4, 9, 3]), ([2], [6, 6]), ([8, 8, 8, 8, 1], [3, 2, 1, 0, 9])])
    skip_set = SkipSet(LAYERS, (2, 3), (2, 3))
    stand_ins = DraftWeights(layers=random_layers(model, {4: TOP})).steps
    stack = model.stack_of(skip_set, stand_ins=stand_ins)
    for text, trace in zip(written, all_traces(AcceptanceTracer(model, written), stack), strict=True):
        expected = trace_of(model, stack, text)
        assert np.array_equal(trace.ranks, expected.ranks)
        assert np.allclose(trace.confidence, expected.confidence, atol=1e-5)


def test_a_draft_that_remembers_leaves_no_trace_in_the_estimates_of_others(gemma2):
    written = references(gemma2, [([1, 2, 3, 4], [5, 6, 7]), ([9], [8, 7, 6, 5])])
    used, plain = AcceptanceTracer(gemma2, written), gemma2.stack_of(SkipSet(LAYERS, mlp=(1,)))
    stand_ins = DraftWeights(layers=random_layers(gemma2, {4: TOP})).steps
    all_traces(used, gemma2.stack_of(SkipSet(LAYERS, (1, 2, 3), (2, 3)), stand_ins=stand_ins))
    for one, fresh in zip(all_traces(used, plain), all_traces(AcceptanceTracer(gemma2, written), plain), strict=True):
        assert np.array_equal(one.confidence, fresh.confidence)


def test_texts_of_one_token_ask_a_draft_that_remembers_for_nothing(tiny):
    stand_ins = DraftWeights(layers=random_layers(tiny, {4: TOP})).steps
    stack = tiny.stack_of(SkipSet(LAYERS, (2, 3), (2, 3)), stand_ins=stand_ins)
    [trace] = all_traces(AcceptanceTracer(tiny, [record(tiny, [1, 2], [3])]), stack)
    assert len(trace.agrees) == 0
