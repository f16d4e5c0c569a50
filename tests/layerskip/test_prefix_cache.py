"""What one generation leaves for the next, and that it changes nothing but the time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import FixedLength, LayerSkipModel, PrefixCache, SkipSet, generate, stream_rounds
from layerskip.drafting.drafter import LayerSkipDrafter
from layerskip.engine import GraphEngine
from layerskip.engine.cuda_graphs import call_directly
from tests.models import near_tie_or_same, tiny_llama
from tests.strategies import draft_exits, skip_sets, tokens


def finished(rounds):
    """All rounds, and the generation that they make up."""
    made = []
    while True:
        try:
            made.append(next(rounds))
        except StopIteration as end:
            return made, end.value


def decoded(model, prompt, memory, **settings_):
    return finished(stream_rounds(model, prompt, memory=memory, eos_token_ids=[], **settings_))[1]


@pytest.fixture(params=["eager", "cuda-graphs"])
def model(request):
    made = LayerSkipModel(tiny_llama())
    if request.param == "cuda-graphs":
        made.engine = GraphEngine(made, call_directly, smallest_bucket=64)
    return made


@given(st.data(), tokens(12), skip_sets(), draft_exits(), st.integers(1, 12))
@settings(max_examples=40)
def test_a_text_that_goes_on_gives_the_same_tokens_as_one_that_is_run_whole(
    tiny, data, prompt, skip_set, draft_exit, length
):
    memory = PrefixCache()
    drafter = LayerSkipDrafter(tiny, skip_set, draft_exit)
    for _ in range(3):
        made = decoded(tiny, prompt, memory, drafter=drafter, max_new_tokens=length)
        whole = generate(tiny, prompt, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
        near_tie_or_same(tiny.hf_model, prompt, made.tokens, whole.tokens)
        text = [*prompt, *made.tokens]
        # What follows begins with some of the text: all of it, a part, or next to nothing.
        prompt = [*text[: data.draw(st.integers(0, len(text)))], *data.draw(tokens(4))][:30]


def test_only_what_is_new_is_run(model):
    memory, prompt = PrefixCache(), [3, 5, 7, 9]
    first = decoded(model, prompt, memory, max_new_tokens=6)
    assert first.stats.reused == 0
    text = [*prompt, *first.tokens]
    # The last token of the text is in no cache yet.
    assert decoded(model, [*text, 1, 2], memory, max_new_tokens=6).stats.reused == len(text) - 1


def test_of_the_same_prompt_the_last_token_is_run_again(model):
    memory = PrefixCache()
    first, second = (decoded(model, [3, 5, 7], memory, max_new_tokens=4) for _ in range(2))
    assert (first.stats.reused, second.stats.reused) == (0, 2)
    assert first.tokens == second.tokens


def test_what_differs_from_the_text_before_is_run_again_from_there_on(model):
    memory = PrefixCache()
    decoded(model, [3, 5, 7, 9, 11], memory, max_new_tokens=4)
    assert decoded(model, [3, 5, 8, 9, 11], memory, max_new_tokens=4).stats.reused == 2
    assert decoded(model, [1, 5, 8], memory, max_new_tokens=4).stats.reused == 0


def test_what_was_forgotten_is_run_again(model):
    memory = PrefixCache()
    decoded(model, [3, 5, 7], memory, max_new_tokens=4)
    memory.forget()
    assert decoded(model, [3, 5, 7], memory, max_new_tokens=4).stats.reused == 0


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_generation_that_is_left_in_the_middle_leaves_what_was_certain(model, rounds):
    memory, drafter = PrefixCache(), LayerSkipDrafter(model, SkipSet(4, (2,)), FixedLength(3))
    begun = stream_rounds(model, [3, 5, 7], drafter=drafter, memory=memory, max_new_tokens=20, eos_token_ids=[])
    certain = [token for _ in range(1 + rounds) for token in next(begun).tokens]
    begun.close()
    prompt = [3, 5, 7, *certain, 1]
    made = decoded(model, prompt, memory, drafter=drafter, max_new_tokens=8)
    assert made.stats.reused == 3 + len(certain) - 1
    assert made.tokens == generate(model, prompt, max_new_tokens=8, eos_token_ids=[]).tokens


def test_a_generation_that_fails_in_the_middle_of_a_draft_leaves_what_was_certain_before(model, monkeypatch):
    memory, drafter = PrefixCache(), LayerSkipDrafter(model, SkipSet(4, (2,)), FixedLength(3))
    verify, calls = model.engine.verify, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return verify(*args)

    monkeypatch.setattr(model.engine, "verify", interrupted)
    begun = stream_rounds(model, [3, 5, 7], drafter=drafter, memory=memory, max_new_tokens=30, eos_token_ids=[])
    certain = [token for _ in range(3) for token in next(begun).tokens]
    with pytest.raises(KeyboardInterrupt):
        next(begun)
    prompt = [3, 5, 7, *certain, 1]
    made = decoded(model, prompt, memory, drafter=drafter, max_new_tokens=8)
    assert made.stats.reused == 3 + len(certain) - 1
    assert made.tokens == generate(model, prompt, max_new_tokens=8, eos_token_ids=[]).tokens


def test_a_generation_that_fails_in_its_prompt_leaves_what_was_certain_before(model, monkeypatch):
    memory = PrefixCache()
    decoded(model, [3, 5, 7], memory, max_new_tokens=4)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoded(model, [3, 5, 8, 9, 1], memory, max_new_tokens=4)
    made = decoded(model, [3, 5, 8, 9, 1], memory, max_new_tokens=4)
    assert made.stats.reused == 2
    assert made.tokens == generate(model, [3, 5, 8, 9, 1], max_new_tokens=4, eos_token_ids=[]).tokens


def test_an_engine_whose_cache_served_another_generation_meanwhile_runs_the_whole_prompt():
    model = LayerSkipModel(tiny_llama())
    model.engine = GraphEngine(model, call_directly, smallest_bucket=8)
    memory = PrefixCache()
    first = decoded(model, [3, 5, 7], memory, max_new_tokens=4)
    generate(model, [9, 9, 9, 9], max_new_tokens=4)
    second = decoded(model, [3, 5, 7], memory, max_new_tokens=4)
    assert (second.stats.reused, second.tokens) == (0, first.tokens)


def test_a_cache_that_cannot_grow_is_replaced_when_the_text_outgrows_it():
    model = LayerSkipModel(tiny_llama())
    model.engine = GraphEngine(model, call_directly, smallest_bucket=8)
    memory, prompt = PrefixCache(), [3, 5, 7]
    for _ in range(3):
        made = decoded(model, prompt, memory, max_new_tokens=10)
        assert made.tokens == generate(LayerSkipModel(model.hf_model), prompt, max_new_tokens=10).tokens
        prompt = [*prompt, *made.tokens, 1]
    assert len(prompt) > 32


@given(tokens(6), skip_sets(), draft_exits(), st.integers(1, 14))
@settings(max_examples=30)
def test_rounds_say_which_tokens_were_drafted(tiny, prompt, skip_set, draft_exit, length):
    drafter = LayerSkipDrafter(tiny, skip_set, draft_exit)
    rounds, generation = finished(
        stream_rounds(tiny, prompt, drafter=drafter, max_new_tokens=length, eos_token_ids=[1, 2])
    )
    assert [token for one in rounds for token in one.tokens] == generation.tokens
    assert rounds[0].accepted == 0
    assert len(rounds[0].tokens) == 1
    assert sum(one.accepted for one in rounds) == generation.stats.accepted
    assert len(rounds) == 1 + generation.stats.rounds
    for one in rounds[:-1]:  # what the text's end cuts off apart, each round has one token that was not drafted
        assert len(one.tokens) == one.accepted + 1
