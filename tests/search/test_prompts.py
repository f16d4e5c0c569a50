"""Prompts: what ships, and which are held out."""

import json
from collections import Counter
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip.errors import InvalidInputError
from layerskip.tokenizer import Prompt
from search.prompts import (
    EncodedPrompt,
    PromptSplit,
    built_in_prompts,
    encode_different,
    split_prompts,
)
from tests.models import tiny_tokenizer

NAMES = st.lists(st.text("abcd", min_size=1, max_size=4), unique=True, min_size=2, max_size=40)


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    return tokenizer


def split(prompts, tokenizer, *, max_new_tokens=1, context_length=1000):
    return split_prompts(prompts, tokenizer, max_new_tokens=max_new_tokens, context_length=context_length)


def shipped_kinds():
    """The kind of each built-in prompt."""
    lines = (files("search") / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return {Prompt(entry["prompt"]): entry["kind"] for entry in map(json.loads, lines)}


def test_thirty_two_different_prompts_ship_eight_of_each_kind():
    assert len(set(built_in_prompts())) == len(built_in_prompts()) == 32
    kinds = shipped_kinds()
    assert set(kinds) == set(built_in_prompts())
    assert Counter(kinds.values()) == {"chat": 8, "summarizing": 8, "code": 8, "reasoning": 8}


def test_two_built_in_prompts_of_each_kind_are_held_out(byte_tokenizer):
    parts = split(built_in_prompts(), byte_tokenizer)
    assert len(parts.search) == 24
    kind_by_id = {prompt.id: kind for prompt, kind in shipped_kinds().items()}
    held_out = Counter(kind_by_id[prompt.id] for prompt in parts.held_out)
    assert held_out == {"chat": 2, "summarizing": 2, "code": 2, "reasoning": 2}


@given(NAMES)
def test_a_quarter_is_held_out_and_the_parts_share_no_prompt(byte_tokenizer, texts):
    parts = split([Prompt(text) for text in texts], byte_tokenizer)
    search, held_out = set(parts.search), set(parts.held_out)
    assert len(parts.held_out) == max(1, len(texts) // 4)
    assert len(parts.search) == len(texts) - len(parts.held_out) >= 1
    assert not search & held_out
    assert {prompt.id for prompt in search | held_out} == {Prompt(text).id for text in texts}


@given(NAMES, st.data())
def test_splitting_is_the_same_each_time_and_repeated_prompts_count_once(byte_tokenizer, texts, data):
    prompts = [Prompt(text) for text in texts]
    repeated = list(prompts)
    for prompt in data.draw(st.lists(st.sampled_from(prompts), max_size=6)):
        first = repeated.index(prompt)
        repeated.insert(data.draw(st.integers(first + 1, len(repeated))), prompt)
    assert split(repeated, byte_tokenizer) == split(prompts, byte_tokenizer)


def test_the_first_prompts_of_a_file_ordered_by_kind_are_a_mixed_sample(byte_tokenizer):
    kind_by_id = {prompt.id: kind for prompt, kind in shipped_kinds().items()}
    first = split(built_in_prompts(), byte_tokenizer).search[:6]
    assert len({kind_by_id[prompt.id] for prompt in first}) >= 3


@pytest.mark.parametrize("texts", [[], ["one"], ["one", "one", "one"]])
def test_fewer_than_two_different_prompts_are_refused(byte_tokenizer, texts):
    with pytest.raises(InvalidInputError, match="at least 2 different ones"):
        split([Prompt(text) for text in texts], byte_tokenizer)


def test_a_prompt_may_fill_the_context_to_the_last_position_and_no_further(byte_tokenizer):
    prompts = [Prompt("short"), Prompt("x" * 20)]
    assert len(split(prompts, byte_tokenizer, max_new_tokens=10, context_length=30).search) == 1
    with pytest.raises(InvalidInputError) as caught:
        split(prompts, byte_tokenizer, max_new_tokens=11, context_length=30)
    message = str(caught.value)
    assert message.startswith("prompt 2: 20 tokens and 11 new ones do not fit the model's context of 30")
    assert "--max-new-tokens" in message
    assert "\n" not in message


def test_a_prompt_that_is_too_long_is_named_by_its_place_in_the_file_repeated_ones_counted(byte_tokenizer):
    prompts = [Prompt("one"), Prompt("one"), Prompt("x" * 40)]
    with pytest.raises(InvalidInputError, match=r"^prompt 3: 40 tokens"):
        encode_different(prompts, byte_tokenizer, max_new_tokens=1, context_length=30)


def test_encoded_prompts_carry_the_id_and_the_tokens_of_theirs(chat_tokenizer):
    prompts = [Prompt("a"), Prompt((("user", "b"),))]
    parts = split(prompts, chat_tokenizer)
    expected = {EncodedPrompt(prompt.id, tuple(prompt.encode(chat_tokenizer))) for prompt in prompts}
    assert {*parts.search, *parts.held_out} == expected


def small_splits():
    prompts = st.builds(
        EncodedPrompt,
        st.sampled_from(["a", "b"]),
        st.lists(st.integers(0, 1), min_size=1, max_size=2).map(tuple),
    )
    part = st.lists(prompts, min_size=1, max_size=2).map(tuple)
    return st.builds(PromptSplit, part, part)


@given(small_splits(), small_splits())
@settings(max_examples=300)
def test_two_splits_have_one_fingerprint_exactly_if_they_are_equal(one, other):
    assert (one.fingerprint == other.fingerprint) == (one == other)


@given(small_splits())
def test_a_fingerprint_changes_when_anything_changes(parts):
    first = parts.search[0]
    changed = [
        PromptSplit(parts.held_out + parts.search, ()),
        PromptSplit(parts.search, (*parts.held_out, first)),
        PromptSplit((EncodedPrompt("c", first.tokens), *parts.search[1:]), parts.held_out),
        PromptSplit((EncodedPrompt(first.id, (*first.tokens, 7)), *parts.search[1:]), parts.held_out),
    ]
    assert parts.fingerprint not in {other.fingerprint for other in changed}
