"""Traces of prompt lookup and of draft heads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import PromptLookup, generate
from layerskip.drafting.prompt_lookup import PromptLookupDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.target_texts import batch_generate
from search.reference import record
from search.traces import trace_heads, trace_lookup
from tests.models import random_heads

HEADS = 3
lookups = st.builds(PromptLookup, *[st.integers(1, 3)] * 3)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), lookups, st.integers(2, 14))
@settings(max_examples=40)
def test_copies_along_a_text_are_those_of_decoding(tiny, prompt, lookup, length):
    """Round by round, they draft and accept what a prompt-lookup drafter does."""
    [new] = batch_generate(tiny, [prompt], length)
    trace = trace_lookup(lookup, record(tiny, prompt, new), places=0)
    place = drafted = accepted = 0
    while place < len(new) - 1:
        proposed = min(trace.copied[place, 0], length - place - 2)
        taken = min(proposed, trace.accepted[place, 0])
        drafted, accepted, place = drafted + proposed, accepted + taken, place + taken + 1
    stats = generate(tiny, prompt, drafter=PromptLookupDrafter(lookup), max_new_tokens=length).stats
    assert (stats.drafted, stats.accepted) == (drafted, accepted)


@pytest.mark.parametrize("new", [[], [4]])
def test_of_a_text_of_next_to_nothing_no_copies_are_accepted(llama, new):
    trace = trace_lookup(PromptLookup(1), record(llama, [4, 4, 4], [*new, 4]), places=2)
    assert not trace.accepted[-1].any()
    assert trace.copied.shape == (len(new) + 1, 3)


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_texts_shorter_than_a_draft_have_traces_all_the_same(tiny, new_tokens):
    [new] = batch_generate(tiny, [[1, 2]], new_tokens)
    weights = DraftWeights(heads=random_heads(tiny, "hydra", HEADS))
    [trace] = trace_heads(tiny, weights, [record(tiny, [1, 2], new)])
    assert trace.ranks.shape == trace.confidence.shape == (HEADS, new_tokens - 1)
