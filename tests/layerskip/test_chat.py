"""A conversation: what is remembered, what is forgotten, and that the answers are the target model's."""

import pytest

from layerskip import Chat, DraftConfig, FixedLength, LayerSkipModel, Sampling, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.errors import InvalidInputError
from layerskip.tokenizer import encode_chat
from tests.models import LAYERS, tiny_llama, tiny_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
CONTEXT = 256


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model():
    return LayerSkipModel(tiny_llama(vocab_size=320, max_position_embeddings=CONTEXT))


@pytest.fixture
def make_chat(model, tokenizer):
    def make(**options):
        drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (1,), (2,)), stopping=FixedLength(3)))
        return Chat(model, tokenizer, **{"drafter": drafter, "max_new_tokens": 8} | options)

    return make


def said(answering):
    """The pieces of an answer, and the answer."""
    pieces = []
    while True:
        try:
            pieces.append(next(answering))
        except StopIteration as finished:
            return pieces, finished.value


def ask(chat, message, **options):
    return said(chat.ask(message, **options))[1]


def test_each_answer_is_the_full_models_to_the_whole_conversation(make_chat, model, tokenizer):
    chat, messages = make_chat(), []
    for message in ("one", "two", "three"):
        messages.append({"role": "user", "content": message})
        expected = generate(model, encode_chat(tokenizer, messages), max_new_tokens=8)
        answer = ask(chat, message)
        assert answer.generation.tokens == expected.tokens
        assert answer.text == tokenizer.decode(expected.tokens, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.text})
    assert chat.history == tuple(messages)


def test_the_pieces_are_the_text_and_as_many_as_were_accepted_are_marked(make_chat, model):
    always_right = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS), stopping=FixedLength(3)))
    pieces, answer = said(make_chat(drafter=always_right).ask("one"))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert any(piece.drafted for piece in pieces)
    pieces, _ = said(make_chat(drafter=None).ask("one"))
    assert not any(piece.drafted for piece in pieces)


def test_what_was_said_before_is_not_run_again(make_chat, tokenizer):
    chat = make_chat()
    first = ask(chat, "one")
    assert first.generation.stats.reused == 0
    # As far as the text of the answer is made of the tokens that were generated, which random bytes often are not.
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "one"}])
    assert ask(chat, "two").generation.stats.reused >= len(prompt)


def test_a_reset_forgets_what_was_said(make_chat):
    chat = make_chat()
    first = ask(chat, "one")
    ask(chat, "two")
    chat.reset()
    assert chat.history == ()
    again = ask(chat, "one")
    assert again.generation.tokens == first.generation.tokens
    assert again.generation.stats.reused == 0


def test_the_oldest_exchanges_are_left_out_when_the_context_is_full(make_chat, model, tokenizer):
    chat = make_chat()
    answers = [ask(chat, f"{number} " + "x" * 60) for number in range(6)]
    assert any(answer.forgotten for answer in answers)
    assert all(answer.generation.finish_reason != "context" for answer in answers)
    kept = len(chat.history) // 2
    assert kept + sum(answer.forgotten for answer in answers) == 6
    assert chat.history[0]["content"].startswith(f"{6 - kept} ")
    # The last answer is to what is left of the conversation, and to nothing else.
    expected = generate(model, encode_chat(tokenizer, list(chat.history[:-1])), max_new_tokens=8)
    assert answers[-1].generation.tokens == expected.tokens


def test_a_message_that_does_not_fit_alone_is_refused_and_the_conversation_goes_on(make_chat):
    chat = make_chat()
    ask(chat, "one")
    before = chat.history
    with pytest.raises(InvalidInputError, match=f"do not fit the model's context of {CONTEXT}"):
        ask(chat, "x" * 300)
    assert chat.history == before
    assert ask(chat, "two").generation.tokens
    assert len(chat.history) == 4


def test_an_answer_may_fill_what_is_left_of_the_context(make_chat):
    answer = ask(make_chat(max_new_tokens=1000), "x" * 200)
    assert answer.generation.finish_reason == "context"


def test_a_stopped_answer_is_part_of_the_conversation_as_far_as_it_came(make_chat, tokenizer):
    chat = make_chat()
    answer = ask(chat, "one", stop=lambda tokens: len(tokens) == 3)
    assert len(answer.generation.tokens) == 3
    assert chat.history[-1] == {"role": "assistant", "content": answer.text}


def test_an_answer_that_is_left_in_the_middle_never_was(make_chat):
    chat, untouched = make_chat(), make_chat()
    begun = chat.ask("one")
    next(begun)
    begun.close()
    assert chat.history == ()
    answer, expected = ask(chat, "two"), ask(untouched, "two")
    assert answer.generation.tokens == expected.generation.tokens
    assert answer.generation.stats.reused > expected.generation.stats.reused  # what both messages begin with


def test_answers_are_sampled_as_asked(make_chat):
    sampling = Sampling(2.0, seed=1)
    one, other = (ask(make_chat(sampling=sampling), "one").generation.tokens for _ in range(2))
    assert one == other
    assert one != ask(make_chat(), "one").generation.tokens


def test_a_tokenizer_without_a_chat_template_has_no_turns(model):
    with pytest.raises(InvalidInputError, match="no chat template"):
        Chat(model, tiny_tokenizer())
