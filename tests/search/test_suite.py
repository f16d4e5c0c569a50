"""Standard suites: read by category, asked turn by turn, and measured as conversations."""

import json

import pytest

from layerskip import LayerSkipModel, generate
from layerskip.engine import EagerEngine
from layerskip.errors import InvalidInputError
from layerskip.tokenizer import encode_chat
from search.decoding_methods import PLAIN, layerskip_method, transformers_method
from search.machine_lock import MachineLock
from search.measure import MeasuringPlan, measure_methods
from search.suite import Question, encode_suite, read_suite
from tests.models import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def suite(tmp_path):
    kinds = [("writing", 2), ("math", 2), ("qa", 1), ("rag", 1)]
    rows = [
        {"question_id": 10 * kind + n, "category": name, "turns": [f"ask {n}", "and then?"][:turns]}
        for kind, (name, turns) in enumerate(kinds)
        for n in range(8)
    ]
    return write(tmp_path / "suite.jsonl", rows)


@pytest.fixture(scope="module")
def engine():
    return EagerEngine(LayerSkipModel(tiny_llama(vocab_size=320, max_position_embeddings=256)))


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def test_so_many_questions_of_each_category_are_spread_over_the_file(suite):
    questions = read_suite(suite, 4)
    assert [question.category for question in questions] == ["mt-bench"] * 4 + ["qa"] * 4 + ["rag"] * 4
    assert [question.id for question in questions[:4]] == ["0", "4", "10", "14"]  # of both kinds of MT-bench
    assert questions[0].turns == ("ask 0", "and then?")
    assert len(read_suite(suite, 99)) == 32


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", "line 1: no question"),
        ('{"question_id": 1, "category": "qa"}', "line 1: no question"),
        ('{"question_id": 1, "category": "qa", "turns": []}', "line 1: no question"),
        ('{"question_id": 1, "category": "qa", "turns": [1]}', "line 1: no question"),
        ('{"question_id": 1, "category": 3, "turns": ["a"]}', "line 1: no question"),
        ("[" * 100_000, "line 1: no question"),
        ('{"question_id": 1, "category": "qa", "turns": "What?"}', "line 1: no question"),
        ('{"question_id": null, "category": "qa", "turns": ["a"]}', "line 1: no question"),
        (2 * '{"question_id": 1, "category": "qa", "turns": ["a"]}\n', "question_id 1 is there 2 times"),
        ("", "has no question"),
    ],
)
def test_what_is_no_suite_is_told_in_one_line(tmp_path, line, problem):
    path = tmp_path / "suite.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidInputError, match=problem) as raised:
        read_suite(path, 1)
    assert "\n" not in str(raised.value)


def test_a_suite_that_cannot_be_read_is_told_too(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot read the suite"):
        read_suite(tmp_path / "missing", 1)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="not a text file"):
        read_suite(tmp_path / "binary", 1)


def test_a_later_turn_follows_the_model_s_own_answer(engine, tokenizer):
    [prompt] = encode_suite([Question("1", "qa", ("Hello", "And?"))], engine, tokenizer, max_new_tokens=6).prompts
    first = encode_chat(tokenizer, [{"role": "user", "content": "Hello"}])
    answer = generate(engine.model, first, engine=engine, max_new_tokens=6).tokens
    said = tokenizer.decode(answer, skip_special_tokens=True)
    messages = [("user", "Hello"), ("assistant", said), ("user", "And?")]
    expected = encode_chat(tokenizer, [{"role": role, "content": text} for role, text in messages])
    assert prompt.turns == (tuple(first), tuple(expected))
    assert prompt.category == "qa"


def test_questions_that_do_not_fit_are_left_out(engine, tokenizer):
    questions = [Question("short", "qa", ("Hi",)), Question("long", "qa", ("x" * 2000,))]
    suite = encode_suite(questions, engine, tokenizer, max_new_tokens=4)
    assert [prompt.id for prompt in suite.prompts] == ["short"]
    assert suite.left_out == ("long",)
    with pytest.raises(InvalidInputError, match="no question fits"):
        encode_suite(questions[1:], engine, tokenizer, max_new_tokens=4)


def test_conversations_are_decoded_turn_by_turn_and_alike_by_every_method(engine, tokenizer, tmp_path):
    questions = [Question("1", "qa", ("Hello", "And?")), Question("2", "rag", ("Why",))]
    prompts = encode_suite(questions, engine, tokenizer, max_new_tokens=6).prompts
    methods = [layerskip_method(PLAIN, engine, None), transformers_method("theirs", engine.model)]
    lock = MachineLock(tmp_path, engine.model.device)
    for ours, theirs in measure_methods(engine.model, methods, MeasuringPlan(prompts, 6), lock):
        assert theirs.error is None
        turns = 2 if ours.prompt == "1" else 1
        assert ours.plain[0].decoded.target_passes == ours.tokens
        assert len(ours.plain[0].decoded.answers) == turns


def test_a_conversation_keeps_what_was_run(engine, tokenizer):
    [prompt] = encode_suite([Question("1", "qa", ("Hello", "And?"))], engine, tokenizer, max_new_tokens=6).prompts
    method = layerskip_method(PLAIN, engine, None)
    runs = []
    prefill = engine.prefill

    class Watched(EagerEngine):
        def prefill(self, tokens, cache):
            runs.append(len(tokens))
            return prefill(tokens, cache)

    watched = layerskip_method(PLAIN, Watched(engine.model), None)
    assert watched.decode_turns(prompt, 6).tokens == method.decode_turns(prompt, 6).tokens
    assert runs[0] == len(prompt.turns[0])
    assert runs[1] < len(prompt.turns[1])
