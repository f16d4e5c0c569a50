"""Prompts: what files hold, and what becomes of it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip.errors import InvalidInputError
from layerskip.tokenizer import Prompt, read_prompts, text_of
from tests.models import tiny_tokenizer

ONE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).map(str.strip).filter(bool)
ANY_TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


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


@pytest.mark.parametrize("raw", ["\ufeffone\ntwo\n", "one\r\ntwo\r\n", "one\ntwo", "\ufeffone\r\n\r\ntwo\n\n\n"])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "PROMPTS.TXT"])
def test_how_a_file_marks_its_beginning_and_its_lines_is_no_part_of_the_prompts(tmp_path, name, raw):
    assert read_prompts(write(tmp_path, name, raw)) == [Prompt("one"), Prompt("two")]


@pytest.mark.parametrize("name", ["prompts.jsonl", "PROMPTS.JSONL", "prompts.JsonL"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_jsonl_file_is_one_however_its_suffix_is_written(tmp_path, name, mark):
    text = f'{mark}{{"prompt": " one "}}\r\n{{"prompt": "two"}}\r\n'
    assert read_prompts(write(tmp_path, name, text)) == [Prompt(" one "), Prompt("two")]


def test_spaces_around_a_prompt_are_its_own():
    assert text_of(" Hello \n") == " Hello "


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
        (lambda path: path.write_text(""), "has no prompt"),
        (lambda path: path.write_text(" \n\t\n\n"), "has no prompt"),
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


@given(ANY_TEXT, ANY_TEXT)
def test_prompt_ids_tell_prompts_apart_and_a_text_from_a_chat(one, other):
    ids = {Prompt(one).id, Prompt(other).id, Prompt((("user", one),)).id}
    assert len(ids) == len({one, other}) + 1
