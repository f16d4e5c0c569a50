"""The loop: where a text ends, what is streamed and counted, what is refused."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, LayerSkipModel, Sampling, SkipSet, StopStrings, generate, stream
from layerskip.drafting.drafter import NoDrafter
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.prompt_lookup import PromptLookupDrafter
from layerskip.errors import InvalidInputError
from tests.models import CONTEXT, VOCABULARY, tiny_llama, transformers_greedy
from tests.strategies import draft_exits, skip_sets, tokens


def often_right(model, length=5):
    """A drafter whose drafts stand now and then, so that rounds of every kind occur."""
    return LayerSkipDrafter(model, DraftConfig(SkipSet(model.num_layers, (2,)), stopping=FixedLength(length)))


def always_right(model, length=5):
    """A drafter that leaves nothing out: every draft stands whole, and rounds are as long as can be."""
    return LayerSkipDrafter(model, DraftConfig(SkipSet(model.num_layers), stopping=FixedLength(length)))


@pytest.fixture(scope="session")
def plain(tiny):
    """24 tokens of plain output with no end in sight."""
    return transformers_greedy(tiny.hf_model, [3, 5], 24)


def first_occurrences(tokens):
    return [i for i, token in enumerate(tokens) if token not in tokens[:i]]


# Where a text ends.


@given(st.data(), st.sampled_from([always_right, often_right]), st.integers(1, 9))
@settings(max_examples=40)
def test_the_text_ends_with_the_first_end_token_wherever_in_a_round_it_comes(tiny, plain, data, drafting, length):
    at = data.draw(st.sampled_from(first_occurrences(plain)))
    generation = generate(
        tiny, [3, 5], drafter=drafting(tiny, length), max_new_tokens=24, eos_token_ids={plain[at], VOCABULARY + 1}
    )
    assert generation.tokens == plain[: at + 1]
    assert generation.finish_reason == "eos"


def test_an_end_token_inside_an_accepted_run_ends_the_text_there(tiny, plain):
    """The first token is the prefill's, tokens 1 to 6 come in one round, and the end token is the fourth of them."""
    end = max(i for i in first_occurrences(plain) if 1 < i < 6)
    generation = generate(tiny, [3, 5], drafter=always_right(tiny), max_new_tokens=24, eos_token_ids=plain[end])
    assert generation.tokens == plain[: end + 1]
    assert generation.finish_reason == "eos"
    assert generation.stats.rounds == 1
    assert generation.stats.accepted == end


def test_of_several_end_tokens_the_first_to_come_counts(tiny, plain):
    early, late = first_occurrences(plain)[2:4]
    for ends in ([plain[early], plain[late]], {plain[late], plain[early]}, (plain[late], plain[early])):
        generation = generate(tiny, [3, 5], drafter=often_right(tiny), max_new_tokens=24, eos_token_ids=ends)
        assert generation.tokens == plain[: early + 1]


def test_a_text_may_end_with_its_first_token(tiny, plain):
    generation = generate(tiny, [3, 5], drafter=often_right(tiny), eos_token_ids=plain[0])
    assert (generation.tokens, generation.finish_reason) == (plain[:1], "eos")
    assert generation.stats.rounds == 0


def test_the_model_s_own_end_tokens_are_the_default_and_none_turns_them_off():
    hf_model = tiny_llama()
    plain = transformers_greedy(hf_model, [3, 5], 12)
    hf_model.generation_config.eos_token_id = [plain[first_occurrences(plain)[3]]]
    model = LayerSkipModel(hf_model)
    assert generate(model, [3, 5], max_new_tokens=12).tokens == plain[: first_occurrences(plain)[3] + 1]
    assert generate(model, [3, 5], max_new_tokens=12, eos_token_ids=()).tokens == plain


@given(st.integers(1, 24), st.sampled_from([always_right, often_right]), st.integers(1, 9))
@settings(max_examples=40)
def test_the_token_limit_may_fall_in_the_middle_of_a_round(tiny, plain, limit, drafting, length):
    generation = generate(tiny, [3, 5], drafter=drafting(tiny, length), max_new_tokens=limit)
    assert generation.tokens == plain[:limit]
    assert generation.finish_reason == "length"


def test_an_end_token_at_the_token_limit_is_the_reason_that_counts(tiny, plain):
    at = first_occurrences(plain)[3]
    generation = generate(tiny, [3, 5], max_new_tokens=at + 1, eos_token_ids=plain[at])
    assert (generation.tokens, generation.finish_reason) == (plain[: at + 1], "eos")


@given(st.integers(1, 23), st.sampled_from([always_right, often_right]))
@settings(max_examples=30)
def test_a_stop_rule_ends_the_text_at_the_first_token_where_it_holds(tiny, plain, length, drafting):
    seen = []

    def stop(text):
        seen.append(list(text))
        return len(text) >= length

    generation = generate(tiny, [3, 5], drafter=drafting(tiny), max_new_tokens=24, stop=stop)
    assert generation.tokens == plain[:length]
    assert generation.finish_reason == "stop"
    assert seen == [plain[: i + 1] for i in range(length)]


@pytest.fixture(scope="session")
def writer(byte_tokenizer):
    """A tiny model that writes text, a token about a byte."""
    return LayerSkipModel(tiny_llama(vocab_size=len(byte_tokenizer)))


@given(st.integers(0, 255), st.integers(0, 20), st.integers(1, 6))
@settings(max_examples=25)
def test_a_stop_string_ends_the_text_with_the_token_that_completes_it(writer, byte_tokenizer, first, start, length):
    prompt = [first]
    plain = generate(writer, prompt, max_new_tokens=30, eos_token_ids=()).tokens
    string = byte_tokenizer.decode(plain)[start : start + length]
    assume("�" not in string and string)
    texts = [byte_tokenizer.decode(plain[: i + 1]) for i in range(len(plain))]
    expected = next(plain[: i + 1] for i, text in enumerate(texts) if string in text)
    generation = generate(
        writer,
        prompt,
        drafter=often_right(writer),
        max_new_tokens=30,
        eos_token_ids=(),
        stop=StopStrings(byte_tokenizer, ["never written", string]),
    )
    assert generation.tokens == expected
    assert generation.finish_reason == "stop"


# The edges of a prompt.


def test_a_prompt_may_be_one_token(tiny):
    generation = generate(tiny, [9], drafter=often_right(tiny), max_new_tokens=12)
    assert generation.tokens == transformers_greedy(tiny.hf_model, [9], 12)


@pytest.mark.parametrize("drafting", [always_right, often_right, lambda model: None])
@pytest.mark.parametrize("room", [0, 1, 2, 6, 7])
def test_the_text_ends_where_the_context_is_full(tiny, room, drafting):
    """The last new token needs no position, so a full context still gives one."""
    prompt = [i % VOCABULARY for i in range(CONTEXT - room)]
    generation = generate(tiny, prompt, drafter=drafting(tiny), max_new_tokens=40)
    assert len(generation.tokens) == room + 1
    assert generation.finish_reason == "context"
    assert generation.tokens == transformers_greedy(tiny.hf_model, prompt, room + 1)


def test_a_token_limit_that_fits_the_context_exactly_is_a_token_limit(tiny):
    generation = generate(tiny, [1] * (CONTEXT - 3), drafter=often_right(tiny), max_new_tokens=4)
    assert (len(generation.tokens), generation.finish_reason) == (4, "length")


@pytest.mark.parametrize(
    "prompt",
    [[3, 5], (3, 5), torch.tensor([3, 5]), torch.tensor([[3, 5]]), torch.tensor([3, 5], dtype=torch.int32), [[3, 5]]],
    ids=["list", "tuple", "[n]", "[1, n]", "int32", "nested"],
)
def test_a_prompt_may_come_as_a_list_or_a_tensor(tiny, plain, prompt):
    assert generate(tiny, prompt, max_new_tokens=6).tokens == plain[:6]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[1, 2], [3, 4]], r"shape \[n\] or \[1, n\], got shape \[2, 2\]; decode a batch one prompt at a time"),
        (torch.zeros(1, 1, 3, dtype=torch.long), r"got shape \[1, 1, 3\]"),
        (torch.tensor(3), r"got shape \[\]"),
        ([], "expected at least one token, got none"),
        (torch.zeros(1, 0, dtype=torch.long), "expected at least one token, got none"),
        ([1.0, 2.0], "expected whole token ids, got torch.float32"),
        ([True, False], "expected whole token ids, got torch.bool"),
        ([1, -1], "token id -1 is outside the vocabulary, 0 to 63"),
        ([VOCABULARY, 1], "token id 64 is outside the vocabulary, 0 to 63"),
        ([1] * (CONTEXT + 1), "65 tokens do not fit the model's context of 64; shorten the prompt"),
    ],
    ids=["batch", "3-d", "0-d", "empty", "empty [1, 0]", "float", "bool", "negative", "too high", "too long"],
)
@pytest.mark.parametrize("decode", [generate, lambda *args: next(stream(*args))], ids=["generate", "stream"])
def test_a_prompt_that_cannot_be_decoded_is_refused_in_one_line(llama, prompt, message, decode):
    with pytest.raises(InvalidInputError, match="^prompt: .*" + message):
        decode(llama, prompt)


@pytest.mark.parametrize("prompt", [[[1, 2], [3]], "some text", ["some", "text"]])
def test_a_prompt_that_is_no_row_of_numbers_is_refused(llama, prompt):
    with pytest.raises(InvalidInputError, match=r"^prompt: "):
        generate(llama, prompt)


@pytest.mark.parametrize(
    ("no_drafter", "message"),
    [
        (PromptLookupDrafter, "drafter: expected a drafter, got the class PromptLookupDrafter; create an instance"),
        ("profile.json", "drafter: expected a drafter, got str; a profile makes one: profile.drafter(model)"),
        (FixedLength(4), "drafter: expected a drafter, got FixedLength; a profile makes one: profile.drafter(model)"),
    ],
)
def test_what_is_no_drafter_is_refused_in_one_line(llama, no_drafter, message):
    with pytest.raises(InvalidInputError) as error:
        generate(llama, [1, 2], drafter=no_drafter)
    assert str(error.value) == message


@pytest.mark.parametrize("limit", [0, -3])
def test_a_token_limit_below_one_is_refused(llama, limit):
    with pytest.raises(InvalidInputError, match=f"max_new_tokens: expected at least 1, got {limit}"):
        generate(llama, [1], max_new_tokens=limit)


# What is streamed.


@given(tokens(6), skip_sets(), draft_exits(), st.sampled_from([Sampling(), Sampling(1.5, seed=3)]))
@settings(max_examples=30)
def test_every_token_is_streamed_once_and_in_order(tiny, prompt, skip_set, draft_exit, sampling):
    settings_ = {
        "drafter": LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=draft_exit)),
        "sampling": sampling,
        "max_new_tokens": 14,
        "eos_token_ids": [1, 2, 3],
    }
    called = []
    generation = generate(tiny, prompt, **settings_, on_token=called.append)
    assert called == generation.tokens

    yielded, tokens_ = [], stream(tiny, prompt, **settings_)
    while True:
        try:
            yielded.append(next(tokens_))
        except StopIteration as finished:
            streamed = finished.value
            break
    assert yielded == streamed.tokens == generation.tokens
    assert streamed.finish_reason == generation.finish_reason
    assert streamed.stats.rounds == generation.stats.rounds


def test_a_stream_can_be_left_in_the_middle(tiny, plain):
    tokens_ = stream(tiny, [3, 5], drafter=often_right(tiny), max_new_tokens=24)
    assert [next(tokens_) for _ in range(4)] == plain[:4]
    tokens_.close()
    assert generate(tiny, [3, 5], drafter=often_right(tiny), max_new_tokens=24).tokens == plain


def test_between_streamed_tokens_the_caller_is_not_in_inference_mode(tiny):
    tokens_ = stream(tiny, [3, 5], max_new_tokens=3)
    next(tokens_)
    assert not torch.is_inference_mode_enabled()


# What is counted.


@given(tokens(6), skip_sets(), draft_exits(), st.integers(1, 16), st.sampled_from([Sampling(), Sampling(1.0, seed=1)]))
@settings(max_examples=40)
def test_the_counters_add_up(tiny, prompt, skip_set, draft_exit, limit, sampling):
    generation = generate(
        tiny,
        prompt,
        drafter=LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=draft_exit)),
        sampling=sampling,
        max_new_tokens=limit,
        eos_token_ids=[1, 2, 3, 4],
    )
    stats = generation.stats
    assert stats.tokens == len(generation.tokens) <= limit
    assert 0 <= stats.accepted <= stats.drafted
    assert stats.accepted < stats.tokens
    # Prefill gives one token, and each round the accepted ones and one more, which an ending may cut off.
    assert stats.tokens in (1 + stats.accepted + stats.rounds, stats.accepted + stats.rounds)
    if generation.finish_reason == "length":
        assert stats.tokens == 1 + stats.accepted + stats.rounds
    if stats.drafted:
        assert stats.acceptance_rate == stats.accepted / stats.drafted
    else:
        assert stats.acceptance_rate is None
    assert min(stats.prefill_seconds, stats.draft_seconds, stats.verification_seconds) >= 0
    assert stats.seconds == stats.prefill_seconds + stats.draft_seconds + stats.verification_seconds
    assert stats.tokens_per_second >= 0


@pytest.mark.parametrize("drafter", [None, NoDrafter()], ids=["none", "NoDrafter"])
def test_plain_decoding_takes_a_round_a_token_and_drafts_nothing(tiny, drafter):
    stats = generate(tiny, [3, 5], drafter=drafter, max_new_tokens=10).stats
    assert (stats.rounds, stats.drafted, stats.accepted, stats.tokens) == (9, 0, 0, 10)
    assert stats.acceptance_rate is None


def test_drafts_that_always_stand_make_long_rounds(tiny):
    """One token from the prefill, then three rounds of five accepted tokens and the target model's own."""
    stats = generate(tiny, [3, 5], drafter=always_right(tiny, 5), max_new_tokens=19).stats
    assert (stats.rounds, stats.drafted, stats.accepted, stats.tokens) == (3, 15, 15, 19)
    assert stats.acceptance_rate == 1


def test_no_token_is_drafted_that_could_not_be_used(tiny):
    """Two tokens to go: the target model's own is the second, so one is drafted, whatever the draft length."""
    stats = generate(tiny, [3, 5], drafter=always_right(tiny, 9), max_new_tokens=3).stats
    assert (stats.rounds, stats.drafted, stats.tokens) == (1, 1, 3)


def test_a_generation_that_ends_at_once_counts_no_rounds(tiny):
    stats = generate(tiny, [3, 5], drafter=often_right(tiny), max_new_tokens=1).stats
    assert (stats.rounds, stats.drafted, stats.accepted, stats.tokens) == (0, 0, 0, 1)
