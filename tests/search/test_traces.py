"""Traces of prompt lookup and of draft heads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import PromptLookup, generate
from layerskip.drafting.prompt_lookup import LookupText, PromptLookupDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.prefix_cache import common_prefix_length
from layerskip.target_texts import batch_generate
from search.reference import record
from search.traces import trace_heads, trace_lookups
from tests.models import random_heads

HEADS = 3
lookups = st.builds(PromptLookup, *[st.integers(1, 3)] * 3)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), lookups, st.integers(2, 14))
@settings(max_examples=40)
def test_copies_along_a_text_are_those_of_decoding(tiny, prompt, lookup, length):
    """Round by round, they draft and accept what a prompt-lookup drafter does."""
    [new] = batch_generate(tiny, [prompt], length)
    [trace] = trace_lookups([lookup], [record(tiny, prompt, new)], places=0)[lookup]
    place = drafted = accepted = 0
    while place < len(new) - 1:
        proposed = min(trace.copied[place, 0], length - place - 2)
        taken = min(proposed, trace.accepted[place, 0])
        drafted, accepted, place = drafted + proposed, accepted + taken, place + taken + 1
    stats = generate(tiny, prompt, drafter=PromptLookupDrafter(lookup), max_new_tokens=length).stats
    assert (stats.drafted, stats.accepted) == (drafted, accepted)


@pytest.mark.parametrize("new", [[], [4]])
def test_of_a_text_of_next_to_nothing_no_copies_are_accepted(llama, new):
    lookup = PromptLookup(1)
    [trace] = trace_lookups([lookup], [record(llama, [4, 4, 4], [*new, 4])], places=2)[lookup]
    assert not trace.accepted[-1].any()
    assert trace.copied.shape == (len(new) + 1, 3)


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_texts_shorter_than_a_draft_have_traces_all_the_same(tiny, new_tokens):
    [new] = batch_generate(tiny, [[1, 2]], new_tokens)
    weights = DraftWeights(heads=random_heads(tiny, "hydra", HEADS))
    [trace] = trace_heads(tiny, weights, [record(tiny, [1, 2], new)])
    assert trace.ranks.shape == trace.confidence.shape == (HEADS, new_tokens - 1)


@given(
    st.lists(st.integers(0, 2), min_size=3, max_size=14), st.integers(1, 2), st.lists(lookups, min_size=1, max_size=4)
)
@settings(max_examples=40)
def test_copies_after_drafts_are_those_that_a_text_so_far_gives(tiny, tokens, prompt_length, tried):
    """For each setting what prompt lookup itself copies, and how much of it is right."""
    text = record(tiny, tokens[:prompt_length], tokens[prompt_length:])
    traces = trace_lookups(tried, [text], places=3)
    for lookup in tried:
        [trace], known = traces[lookup], LookupText(lookup)
        known.extend(tokens[:prompt_length])
        for row in range(text.new_tokens):
            newest = prompt_length + row
            known.extend(tokens[newest : newest + 1])
            for drafted in range(min(3, text.new_tokens - 1 - row) + 1):
                following = newest + 1 + drafted
                copy = known.copy(lookup.length - drafted, tokens[newest + 1 : following])
                assert trace.copied[row, drafted] == len(copy)
                assert trace.accepted[row, drafted] == common_prefix_length(copy, tokens[following:])
