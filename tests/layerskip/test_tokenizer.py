"""Prompts become token ids, and stop strings are found whatever tokens they are made of."""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from layerskip import StopStrings
from layerskip.errors import InvalidInputError
from layerskip.tokenizer import encode_chat, encode_prompt, encode_raw
from tests.models import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
PICKY = "{{ raise_exception('only users may speak') }}"


@pytest.fixture(scope="module")
def chatty():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_prompt_is_wrapped_as_one_user_turn_where_there_is_a_chat_template(chatty):
    assert chatty.decode(encode_prompt(chatty, "hello")) == "<user>hello<bot>"


def test_a_prompt_stays_as_it_is_where_there_is_no_chat_template(byte_tokenizer):
    assert byte_tokenizer.decode(encode_prompt(byte_tokenizer, "hello")) == "hello"


def test_a_raw_prompt_stays_as_it_is_in_spite_of_a_chat_template(chatty):
    assert chatty.decode(encode_raw(chatty, "hello")) == "hello"


def test_a_conversation_ends_where_the_model_answers(chatty):
    messages = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}, {"role": "user", "content": "?"}]
    ids = encode_chat(chatty, messages)
    assert all(type(token) is int for token in ids)
    assert chatty.decode(ids) == "<user>hi<bot>yo<user>?<bot>"


def test_a_conversation_needs_a_chat_template(byte_tokenizer):
    with pytest.raises(InvalidInputError, match="messages: the model's tokenizer has no chat template"):
        encode_chat(byte_tokenizer, [{"role": "user", "content": "hi"}])


def test_what_a_template_refuses_is_reported_with_its_words():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PICKY
    with pytest.raises(InvalidInputError, match="refused them: only users may speak"):
        encode_prompt(tokenizer, "hello")


# Stop strings.


def stops_at(tokenizer, tokens, strings):
    """How many tokens there are when the rule first holds; None if it never does."""
    stop = StopStrings(tokenizer, strings)
    return next((i for i in range(1, len(tokens) + 1) if stop(tokens[:i])), None)


def test_a_stop_string_may_span_tokens_and_begin_inside_one(byte_tokenizer):
    tokens = encode_raw(byte_tokenizer, "a stop!")
    assert [byte_tokenizer.decode([t]) for t in tokens] == ["a", " ", "stop", "!"]
    assert stops_at(byte_tokenizer, tokens, ["op!"]) == 4
    assert stops_at(byte_tokenizer, tokens, ["a st"]) == 3
    assert stops_at(byte_tokenizer, tokens, ["to"]) == 3
    assert stops_at(byte_tokenizer, tokens, ["pots"]) is None


def test_a_stop_string_may_be_a_character_of_several_tokens(byte_tokenizer):
    tokens = encode_raw(byte_tokenizer, "x😀y")
    assert len(tokens) == 6
    assert stops_at(byte_tokenizer, tokens, ["😀"]) == 5


def test_a_special_token_has_a_text_too(byte_tokenizer):
    assert stops_at(byte_tokenizer, [5, byte_tokenizer.eos_token_id], ["<end>"]) == 2


texts = st.text(st.sampled_from("stop é😀\n") | st.characters(codec="utf-8"), max_size=40)


@given(texts, st.lists(texts.filter(bool), max_size=2), st.integers(0, 39), st.integers(1, 12))
@example("é" * 30 + "stop", [], 29, 5)
@settings(max_examples=200)
def test_the_first_token_that_completes_a_stop_string_is_found(byte_tokenizer, text, strings, start, length):
    """The rule reads only the end of a text; reading all of it every time would say the same."""
    strings = [*strings, text[start : start + length]] if text[start : start + length] else strings
    assume(strings and not any("�" in string for string in strings))
    tokens = encode_raw(byte_tokenizer, text)
    ends = (i for i in range(1, len(tokens) + 1) if any(s in byte_tokenizer.decode(tokens[:i]) for s in strings))
    assert stops_at(byte_tokenizer, tokens, strings) == next(ends, None)


def test_a_single_stop_string_needs_no_list(byte_tokenizer):
    tokens = encode_raw(byte_tokenizer, "a\nb\n\nc")
    assert stops_at(byte_tokenizer, tokens, "\n\n") == stops_at(byte_tokenizer, tokens, ["\n\n"]) == 5


@pytest.mark.parametrize("strings", [[], [""], ["end", ""], ""])
def test_no_stop_string_and_empty_ones_are_refused(byte_tokenizer, strings):
    with pytest.raises(InvalidInputError, match="stop strings: expected at least one, none of them empty"):
        StopStrings(byte_tokenizer, strings)
