"""Text as it comes: whole characters, nothing lost, and what was drafted marked as such."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from layerskip.tokenizer import StreamingDetokenizer, TextSegment


def written(tokenizer, marked):
    pieces = StreamingDetokenizer(tokenizer)
    made = [piece for token, drafted in marked for piece in pieces.put(token, drafted)]
    return made + pieces.end()


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


@given(st.lists(st.integers(0, 259)))
def test_the_pieces_of_any_tokens_are_their_text(byte_tokenizer, tokens):
    pieces = written(byte_tokenizer, [(token, False) for token in tokens])
    assert text_of(pieces) == byte_tokenizer.decode(tokens, skip_special_tokens=True)
    assert all(piece.text for piece in pieces)


@given(st.text())
def test_characters_that_span_tokens_come_whole(byte_tokenizer, text):
    pieces = written(byte_tokenizer, [(token, False) for token in byte_tokenizer(text).input_ids])
    assert text_of(pieces) == text
    if "�" not in text:
        assert not any("�" in piece.text for piece in pieces)


def test_a_piece_comes_with_the_token_that_completes_it(byte_tokenizer):
    pieces = StreamingDetokenizer(byte_tokenizer)
    tokens = byte_tokenizer("aé€b").input_ids  # of 1, 2, 3 and 1 bytes, one token each
    assert [text_of(pieces.put(token, False)) for token in tokens] == ["a", "", "é", "", "", "€", "b"]
    assert pieces.end() == []


def test_a_character_without_its_last_bytes_comes_at_the_end(byte_tokenizer):
    tokens = byte_tokenizer("a€").input_ids[:-1]
    assert written(byte_tokenizer, [(token, False) for token in tokens]) == [
        TextSegment("a", False),
        TextSegment("�", False),
    ]


def test_special_tokens_have_no_text(byte_tokenizer):
    end = byte_tokenizer.eos_token_id
    marked = [(token, True) for token in [*byte_tokenizer("ab").input_ids, end]]
    assert written(byte_tokenizer, marked) == [TextSegment("a", True), TextSegment("b", True)]


@given(st.text(), st.data())
def test_a_piece_was_drafted_if_all_of_its_tokens_were(byte_tokenizer, text, data):
    tokens = byte_tokenizer(text).input_ids
    marks = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    pieces = written(byte_tokenizer, list(zip(tokens, marks, strict=True)))
    at = 0
    for piece in pieces:
        width = len(byte_tokenizer(piece.text).input_ids)
        if "�" in text:
            return  # where the text itself has one, a piece may end behind it
        assert piece.drafted == all(marks[at : at + width])
        at += width


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    """As Llama-2's and Gemma's: a word's space belongs to its token, and a text alone begins without one."""
    words = ["<unk>", "▁one", "▁two", "s", "<0xE2>", "<0x82>", "<0xAC>"]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_spaces_between_words_are_kept_where_a_token_alone_is_written_without_one(sentencepiece_tokenizer):
    pieces = written(sentencepiece_tokenizer, [(1, True), (2, False), (3, True), (4, True), (5, True), (6, True)])
    assert pieces == [
        TextSegment("one", True),
        TextSegment(" two", False),
        TextSegment("s", True),
        TextSegment("€", True),
    ]
