"""Prompts: what ships, what files hold, and which are held out."""

import json
from collections import Counter
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip.errors import InvalidInputError
from search.prompts import (
    EncodedPrompt,
    Prompt,
    PromptSplit,
    built_in_prompts,
    encode_different,
    read_prompts,
    split_prompts,
)
from tests.models import tiny_tokenizer

ONE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).map(str.strip).filter(bool)
ANY_TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
NAMES = st.lists(st.text("abcd", min_size=1, max_size=4), unique=True, min_size=2, max_size=40)


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'judge' %}{{ raise_exception('no judges here') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


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


@given(st.lists(ONE_LINE, min_size=1))
@settings(max_examples=50)
def test_a_plain_file_holds_one_prompt_a_line(folder, texts):
    path = write(folder, "plain.txt", "\n\n".join(texts) + "\n  \n")
    assert read_prompts(path) == [Prompt(text) for text in texts]


@given(st.lists(ANY_TEXT, min_size=1), st.booleans())
@settings(max_examples=50)
def test_a_jsonl_file_gives_each_prompt_exactly_as_written(folder, texts, ascii_only):
    lines = [json.dumps({"prompt": text, "kind": "chat"}, ensure_ascii=ascii_only) for text in texts]
    assert read_prompts(write(folder, "some.jsonl", "\n\n".join(lines))) == [Prompt(text) for text in texts]


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=9)), min_size=1))
@settings(max_examples=50)
def test_a_jsonl_file_gives_the_messages_of_a_chat(folder, messages):
    entry = {"messages": [{"role": role, "content": content, "name": "x"} for role, content in messages]}
    assert read_prompts(write(folder, "chat.jsonl", json.dumps(entry))) == [Prompt(tuple(messages))]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"prompt": "cut', "not JSON"),
        ("just a text", "not JSON"),
        ('["prompt"]', "expected an object with a 'prompt'"),
        ('"prompt"', "expected an object with a 'prompt'"),
        ('{"text": "hello"}', "expected an object with a 'prompt'"),
        ('{"prompt": 3}', "expected an object with a 'prompt'"),
        ('{"prompt": " \\n"}', "expected an object with a 'prompt'"),
        ('{"messages": []}', "expected an object with a 'prompt'"),
        ('{"messages": "hello"}', "expected an object with a 'prompt'"),
        ('{"messages": ["hello"]}', "needs a 'role' and a 'content'"),
        ('{"messages": [{"role": "user"}]}', "needs a 'role' and a 'content'"),
        ('{"messages": [{"role": "user", "content": ["hello"]}]}', "needs a 'role' and a 'content'"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, wrong):
    path = write(tmp_path, "bad.jsonl", f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ")
    assert wrong in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda path: None, "cannot read the prompts: No such file"),
        (lambda path: path.mkdir(), "cannot read the prompts: Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00prompt"), "not a text file"),
        (lambda path: path.write_text(""), "holds no prompt"),
        (lambda path: path.write_text(" \n\t\n\n"), "holds no prompt"),
    ],
    ids=["missing", "folder", "binary", "empty", "blank"],
)
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_without_prompts_is_named_in_one_line(tmp_path, make, wrong, name):
    path = tmp_path / name
    make(path)
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}: {wrong}")
    assert "\n" not in str(caught.value)


def test_a_text_is_wrapped_as_one_user_turn_where_there_is_a_template(chat_tokenizer, byte_tokenizer):
    wrapped = Prompt("hello").encode(chat_tokenizer)
    assert wrapped == Prompt((("user", "hello"),)).encode(chat_tokenizer)
    assert chat_tokenizer.decode(wrapped) == "[user]hello[assistant]"
    assert byte_tokenizer.decode(Prompt("hello").encode(byte_tokenizer)) == "hello"


def test_a_chat_keeps_the_order_and_roles_of_its_messages(chat_tokenizer):
    prompt = Prompt((("system", "be brief"), ("user", "hi"), ("assistant", "ho"), ("user", "why?")))
    expected = "[system]be brief[user]hi[assistant]ho[user]why?[assistant]"
    assert chat_tokenizer.decode(prompt.encode(chat_tokenizer)) == expected


def test_a_chat_for_a_model_without_a_template_is_refused(byte_tokenizer):
    with pytest.raises(InvalidInputError, match="no chat template"):
        Prompt((("user", "hello"),)).encode(byte_tokenizer)


def test_messages_that_the_template_refuses_are_refused_with_its_reason(chat_tokenizer):
    with pytest.raises(InvalidInputError, match="refused them: no judges here"):
        Prompt((("judge", "hello"),)).encode(chat_tokenizer)


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


@given(ANY_TEXT, ANY_TEXT)
def test_prompt_ids_tell_prompts_apart_and_a_text_from_a_chat(one, other):
    ids = {Prompt(one).id, Prompt(other).id, Prompt((("user", one),)).id}
    assert len(ids) == len({one, other}) + 1
