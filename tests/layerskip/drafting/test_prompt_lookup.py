"""Drafts copied from the text: from where its last tokens came before, at no cost to the output."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList

from layerskip import DraftConfig, FixedLength, PromptLookup, Sampling, SkipSet, generate
from layerskip.drafting.factory import make_drafter
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.prompt_lookup import LookupText, PromptLookupDrafter
from layerskip.drafting.suffix_automaton import Match, SuffixAutomaton
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from layerskip.generation import stream_rounds
from layerskip.logits_processing import GenerationHistory, ProcessorSampling
from layerskip.sampling import Draft, Draw
from tests.layerskip.drafting.test_draft_layer import Watched, drafter_with_layers, from_scratch
from tests.layerskip.test_sampling_exactness import (
    DOUBT,
    PLAIN,
    SKIPPED,
    distribution_of_texts,
    p_value,
    samples,
)
from tests.layerskip.test_sampling_exactness import model as tiny_vocabulary  # noqa: F401
from tests.models import LAYERS, VOCABULARY, near_tie_or_same, transformers_greedy
from tests.strategies import skip_sets, tokens

lookups = st.builds(PromptLookup, st.integers(1, 3), st.integers(1, 6), st.integers(1, 3))
few_tokens = st.lists(st.integers(0, 2), max_size=20)


def copied_by_definition(text, drafted, lookup, limit):
    """By a search through the whole text: longest run first, and of its occurrences the last."""
    whole = [*text, *drafted]
    for size in range(len(whole), lookup.shortest - 1, -1):
        for start in range(len(text) - size - (not drafted), -1, -1):
            if text[start : start + size] == whole[len(whole) - size :]:
                copied = list(whole)
                for place in range(start + size, start + size + min(limit, size * lookup.per_match)):
                    copied.append(copied[place])
                return copied[len(whole) :]
    return []


def known(lookup, text, corpus=None):
    """What copies from a text, and from a corpus."""
    other = None
    if corpus is not None:
        other = SuffixAutomaton()
        other.extend(corpus)
    lookup_text = LookupText(lookup, other)
    lookup_text.extend(text)
    return lookup_text


@given(few_tokens, few_tokens, lookups, st.integers(0, 8), st.integers(0, 20))
@settings(max_examples=300)
def test_what_followed_the_longest_last_run_where_it_came_last_is_copied(text, drafted, lookup, limit, cut):
    growing = known(lookup, text[:cut])
    assert growing.copy(limit) == copied_by_definition(text[:cut], [], lookup, limit)
    assert growing.copy(limit, drafted) == copied_by_definition(text[:cut], drafted, lookup, limit)
    growing.extend(text[cut:])
    assert growing.copy(limit) == copied_by_definition(text, [], lookup, limit)


def test_a_text_that_repeats_itself_goes_on_repeating():
    assert known(PromptLookup(2, per_match=4), [1, 2, 3, 1, 2]).copy(7) == [3, 1, 2, 3, 1, 2, 3]


def test_the_longer_the_run_the_more_is_copied():
    growing = known(PromptLookup(1, per_match=2), [1, 2, 3, 4, 5, 6, 7, 8, 9, 3])
    assert growing.copy(99) == [4, 5]
    growing.extend([4])
    assert growing.copy(99) == [5, 6, 7, 8]


@given(few_tokens, few_tokens, few_tokens, lookups, st.integers(0, 8))
@settings(max_examples=200)
def test_a_corpus_is_copied_from_where_a_longer_run_occurs_in_it(corpus, text, drafted, lookup, limit):
    whole = [*text, *drafted]
    runs = [whole[len(whole) - size :] for size in range(len(whole), 0, -1)]
    ends = range(len(corpus), 0, -1)
    longest = next((run for run in runs for end in ends if corpus[:end][-len(run) :] == run), [])
    # Where it occurred last, but at the corpus's end, where nothing follows.
    end = next((end for end in ends[1:] if longest and corpus[:end][-len(longest) :] == longest), None)
    own_length = next((n for n in range(len(whole), 0, -1) if own_run(text, drafted, n)), 0)
    copied = known(lookup, text, corpus).copy(limit, drafted)
    if end is not None and len(longest) > own_length:
        count = min(limit, lookup.per_match * len(longest))
        assert copied == (corpus[end : end + count] if len(longest) >= lookup.shortest else [])
    else:
        assert copied == known(lookup, text).copy(limit, drafted)


def own_run(text, drafted, size):
    """Whether the last tokens occurred in the text before, or with a draft after it, at all."""
    whole = [*text, *drafted]
    starts = range(len(text) - size + (1 if drafted else 0))
    return any(text[start : start + size] == whole[len(whole) - size :] for start in starts)


def test_a_corpus_leaves_the_output_and_saves_rounds(llama):
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1))
    options = {"max_new_tokens": 24, "eos_token_ids": []}
    plain = generate(llama, [5, 9], **options)
    rounds = []
    for corpus in ([7, 7], [3, 5, 9, *plain.tokens]):
        drafter = make_drafter(llama, config, corpus=corpus)
        ours = [generate(llama, [5, 9], drafter=drafter, **options) for _ in range(2)]  # a corpus serves every text
        assert [generation.tokens for generation in ours] == [plain.tokens] * 2
        rounds.append(ours[1].stats.rounds)
    assert rounds[1] < rounds[0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=16), lookups, st.integers(1, 24))
@settings(max_examples=40)
def test_greedy_output_is_that_of_transformers(tiny, prompt, lookup, length):
    ours = generate(tiny, prompt, drafter=PromptLookupDrafter(lookup), max_new_tokens=length, eos_token_ids=[])
    near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, length, set()))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=16), lookups, skip_sets(), st.integers(1, 24))
@settings(max_examples=25)
def test_a_first_try_leaves_the_output_of_transformers(tiny, prompt, lookup, skip_set, length):
    second = LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=FixedLength(3), tree=(2,)))
    drafter = PromptLookupDrafter(lookup, second)
    ours = generate(tiny, prompt, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
    near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, length, set()))


@pytest.mark.parametrize("combined", [False, True], ids=["alone", "as a first try"])
def test_samples_follow_the_full_model(tiny_vocabulary, combined):  # noqa: F811
    second = LayerSkipDrafter(tiny_vocabulary, DraftConfig(SKIPPED, stopping=FixedLength(1), tree=(2,)))
    drafter = PromptLookupDrafter(PromptLookup(shortest=1, length=3), second if combined else None)
    observed = samples(tiny_vocabulary, drafter, PLAIN)
    assert p_value(observed, distribution_of_texts(tiny_vocabulary, PLAIN)) > DOUBT


def test_copies_are_proposed_whatever_temperature_and_top_p(llama):
    """Of one token everything is left by top-k and top-p."""
    sampling = Sampling(2.0, top_k=3, top_p=0.5, seed=1)
    stats = generate(llama, [1, 2, 1, 2, 1], drafter=PromptLookupDrafter(), sampling=sampling, max_new_tokens=12).stats
    assert stats.drafted


def test_processed_text_is_that_of_plain_decoding(llama):
    def text(drafter):
        history = GenerationHistory(torch.tensor([[3, 4, 3, 4, 3]]), StoppingCriteriaList())
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
        sampling = ProcessorSampling(history, processors, do_sample=False, vocab_size=VOCABULARY)
        return generate(llama, [3, 4, 3, 4, 3], drafter=drafter, sampling=sampling, max_new_tokens=16).tokens

    assert text(PromptLookupDrafter(PromptLookup(shortest=1))) == text(None)


def test_copies_that_stand_save_rounds(llama):
    """The second half of the prompt's continuation was in the prompt."""
    once = generate(llama, [5, 9], max_new_tokens=16, eos_token_ids=[]).tokens
    prompt = [5, 9, *once, 5, 9]
    whole = generate(llama, prompt, max_new_tokens=8, eos_token_ids=[])
    drafted = generate(
        llama, prompt, drafter=PromptLookupDrafter(PromptLookup(1, 4, 4)), max_new_tokens=8, eos_token_ids=[]
    )
    assert drafted.tokens == whole.tokens
    assert drafted.stats.drafted
    assert drafted.stats.rounds + drafted.stats.accepted == whole.stats.rounds


def test_a_layer_of_the_second_drafters_own_sees_what_the_first_drafted(tiny):
    """Its proposals are those of a pass over the whole text, whoever drafted it."""
    second = drafter_with_layers(tiny, {2: 2 * LAYERS}, FixedLength(3), cls=Watched)
    drafter = PromptLookupDrafter(PromptLookup(1, 2), second)
    stats = [generate(tiny, [first, 2, first, 2, 1], drafter=drafter, max_new_tokens=20).stats for first in range(3)]
    assert 0 < len(second.seen) < stats[-1].drafted
    for text, logits in second.seen:
        torch.testing.assert_close(logits, from_scratch(tiny, second._stack, text), atol=2e-4, rtol=2e-4)


def test_a_copy_of_a_first_try_serves_a_generation_of_its_own(llama):
    second = LayerSkipDrafter(llama, DraftConfig(SkipSet(LAYERS, (1,)), stopping=FixedLength(2)))
    one = PromptLookupDrafter(drafter=second)
    other = copy.copy(one)
    expected = generate(llama, [1, 2, 1], drafter=one, max_new_tokens=9).tokens
    rounds = stream_rounds(llama, [1, 2, 1], drafter=one, max_new_tokens=9)
    first = list(next(rounds).tokens)
    generate(llama, [5, 6, 5, 6], drafter=other, max_new_tokens=9)
    assert first + [token for one_round in rounds for token in one_round.tokens] == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0,), "shortest: expected at least 1, got 0"),
        ((2, 0), "length: expected at least 1, got 0"),
        ((2, 3, 0), "per_match: expected at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(values, message):
    with pytest.raises(InvalidInputError) as error:
        PromptLookup(*values)
    assert str(error.value) == message


@given(tokens(12))
def test_a_text_without_repetition_gives_nothing(prompt):
    assert known(PromptLookup(shortest=1), list(dict.fromkeys(prompt))).copy(5) == []


def test_a_draft_without_prompt_lookup_is_the_stacks_alone(llama):
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1))
    assert isinstance(make_drafter(llama, config), LayerSkipDrafter)
    assert isinstance(make_drafter(llama, replace(config, prompt_lookup=PromptLookup())), PromptLookupDrafter)


def test_copied_tokens_are_a_chain_that_nothing_drew():
    draft = Draft.certain([5, 3, 5], torch.device("cpu"))
    assert draft.tokens.tolist() == [5, 3, 5]
    assert draft.tree.is_chain
    assert draft.distributions == (None,) * 3
    assert len(Draft.certain([], torch.device("cpu"))) == 0


def test_copies_continue_the_main_path_of_a_tree():
    drawn = [torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8])]
    tokens = [torch.tensor([5, 6]), torch.tensor([7, 8, 9])]
    draft = Draft.of([Draw(t, q) for t, q in zip(tokens, drawn, strict=True)], torch.device("cpu"))
    longer = draft.continued([3, 4])
    assert draft.main_path.tolist() == [5, 7]
    assert longer.main_path.tolist() == [5, 7, 3, 4]
    assert longer.tokens.tolist() == [*draft.tokens.tolist(), 3, 4]
    assert [longer.distributions[at] is drawn[at] for at in range(2)] == [True, True]
    assert longer.distributions[2:] == (None, None)
    assert draft.continued([]) is draft


def test_copies_that_continue_a_draft_save_rounds(llama, monkeypatch):
    """The model's own stack as its draft: every token that it drafts stands, and so do the copies after it."""
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1), prompt_lookup=PromptLookup(2, 9, 4))
    once = generate(llama, [5, 9], max_new_tokens=24, eos_token_ids=[]).tokens
    prompt, options = [5, 9, *once, 5], {"max_new_tokens": 24, "eos_token_ids": []}

    def decoded():
        return generate(llama, prompt, drafter=make_drafter(llama, config), **options)

    continued = decoded()
    monkeypatch.setattr(Draft, "continued", lambda self, tokens: self)
    alone = decoded()
    assert continued.tokens == alone.tokens == generate(llama, prompt, **options).tokens
    assert continued.stats.rounds < alone.stats.rounds


def test_samples_follow_the_full_model_with_a_draft_vocabulary(tiny_vocabulary):  # noqa: F811
    """Of one draft, some tokens were drawn from a part of the vocabulary, and others are certain."""
    config = DraftConfig(SKIPPED, stopping=FixedLength(1), prompt_lookup=PromptLookup(1, 3))
    weights = DraftWeights(token_ids=torch.tensor([0, 2]))
    observed = samples(tiny_vocabulary, make_drafter(tiny_vocabulary, config, weights), PLAIN)
    assert p_value(observed, distribution_of_texts(tiny_vocabulary, PLAIN)) > DOUBT


def test_an_automaton_is_told_of_a_repeated_token_in_steps_that_do_not_grow_with_the_text():
    growing = SuffixAutomaton()
    growing.extend([7] * 3000)
    assert growing.match == Match(2999, 2999)
    assert growing.match_after([7]) == Match(3000, 3000)
    assert sum(end >= 2990 for end in growing._end) < 100  # the others have an earlier occurrence


def test_what_a_corpus_ends_with_is_copied_from_where_it_came_before():
    assert known(PromptLookup(2, 9, 1), [5, 1, 2], [1, 2, 3, 4, 1, 2]).copy(9) == [3, 4]
    assert known(PromptLookup(1, 9, 1), [2, 7, 9, 1, 2], [1, 2]).copy(9) == [7]  # nothing follows it there
