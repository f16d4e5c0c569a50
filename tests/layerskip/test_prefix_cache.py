"""What one generation leaves for the next, and that it changes nothing but the time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, LayerSkipModel, PrefixCache, SkipSet, generate, stream_rounds
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import EagerEngine, GraphEngine
from tests.capture import call_directly
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


def rounds_of(engine, prompt, prompt_cache, **settings_):
    return stream_rounds(engine.model, prompt, engine=engine, prompt_cache=prompt_cache, eos_token_ids=[], **settings_)


def decoded(engine, prompt, prompt_cache, **settings_):
    return finished(rounds_of(engine, prompt, prompt_cache, **settings_))[1]


def decoded_anew(engine, prompt, length):
    """The tokens of a generation that begins with nothing."""
    return generate(engine.model, prompt, max_new_tokens=length, eos_token_ids=[]).tokens


@pytest.fixture(params=["eager", "cuda-graphs"])
def engine(request):
    model = LayerSkipModel(tiny_llama())
    return EagerEngine(model) if request.param == "eager" else GraphEngine(model, call_directly, smallest_bucket=64)


@given(st.data(), tokens(12), skip_sets(), draft_exits(), st.integers(1, 12))
@settings(max_examples=40)
def test_a_text_that_goes_on_gives_the_same_tokens_as_one_that_is_run_whole(
    tiny, data, prompt, skip_set, draft_exit, length
):
    prompt_cache, engine = PrefixCache(), EagerEngine(tiny)
    drafter = LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=draft_exit))
    for _ in range(3):
        made = decoded(engine, prompt, prompt_cache, drafter=drafter, max_new_tokens=length)
        whole = generate(tiny, prompt, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
        near_tie_or_same(tiny.hf_model, prompt, made.tokens, whole.tokens)
        text = [*prompt, *made.tokens]
        # What follows begins with some of the text: all of it, a part, or next to nothing.
        prompt = [*text[: data.draw(st.integers(0, len(text)))], *data.draw(tokens(4))][:30]


def test_only_what_is_new_is_run(engine):
    prompt_cache, prompt = PrefixCache(), [3, 5, 7, 9]
    first = decoded(engine, prompt, prompt_cache, max_new_tokens=6)
    assert first.stats.reused == 0
    text = [*prompt, *first.tokens]
    # The last token of the text is in no cache yet.
    assert decoded(engine, [*text, 1, 2], prompt_cache, max_new_tokens=6).stats.reused == len(text) - 1


def test_of_the_same_prompt_the_last_token_is_run_again(engine):
    prompt_cache = PrefixCache()
    first, second = (decoded(engine, [3, 5, 7], prompt_cache, max_new_tokens=4) for _ in range(2))
    assert (first.stats.reused, second.stats.reused) == (0, 2)
    assert first.tokens == second.tokens


def test_what_differs_from_the_text_before_is_run_again_from_there_on(engine):
    prompt_cache = PrefixCache()
    decoded(engine, [3, 5, 7, 9, 11], prompt_cache, max_new_tokens=4)
    assert decoded(engine, [3, 5, 8, 9, 11], prompt_cache, max_new_tokens=4).stats.reused == 2
    assert decoded(engine, [1, 5, 8], prompt_cache, max_new_tokens=4).stats.reused == 0


def test_what_was_forgotten_is_run_again(engine):
    prompt_cache = PrefixCache()
    decoded(engine, [3, 5, 7], prompt_cache, max_new_tokens=4)
    prompt_cache.clear()
    assert decoded(engine, [3, 5, 7], prompt_cache, max_new_tokens=4).stats.reused == 0


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_generation_that_is_left_in_the_middle_leaves_what_was_certain(engine, rounds):
    prompt_cache, drafter = (
        PrefixCache(),
        LayerSkipDrafter(engine.model, DraftConfig(SkipSet(4, (2,)), stopping=FixedLength(3))),
    )
    begun = rounds_of(engine, [3, 5, 7], prompt_cache, drafter=drafter, max_new_tokens=20)
    certain = [token for _ in range(1 + rounds) for token in next(begun).tokens]
    begun.close()
    prompt = [3, 5, 7, *certain, 1]
    made = decoded(engine, prompt, prompt_cache, drafter=drafter, max_new_tokens=8)
    assert made.stats.reused == 3 + len(certain) - 1
    assert made.tokens == decoded_anew(engine, prompt, 8)


def test_a_generation_that_fails_in_the_middle_of_a_draft_leaves_what_was_certain_before(engine, monkeypatch):
    prompt_cache, drafter = (
        PrefixCache(),
        LayerSkipDrafter(engine.model, DraftConfig(SkipSet(4, (2,)), stopping=FixedLength(3))),
    )
    verify, calls = engine.verify, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return verify(*args)

    monkeypatch.setattr(engine, "verify", interrupted)
    begun = rounds_of(engine, [3, 5, 7], prompt_cache, drafter=drafter, max_new_tokens=30)
    certain = [token for _ in range(3) for token in next(begun).tokens]
    with pytest.raises(KeyboardInterrupt):
        next(begun)
    prompt = [3, 5, 7, *certain, 1]
    made = decoded(engine, prompt, prompt_cache, drafter=drafter, max_new_tokens=8)
    assert made.stats.reused == 3 + len(certain) - 1
    assert made.tokens == decoded_anew(engine, prompt, 8)


def test_a_generation_that_fails_in_its_prompt_leaves_what_was_certain_before(engine, monkeypatch):
    prompt_cache = PrefixCache()
    decoded(engine, [3, 5, 7], prompt_cache, max_new_tokens=4)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoded(engine, [3, 5, 8, 9, 1], prompt_cache, max_new_tokens=4)
    made = decoded(engine, [3, 5, 8, 9, 1], prompt_cache, max_new_tokens=4)
    assert made.stats.reused == 2
    assert made.tokens == decoded_anew(engine, [3, 5, 8, 9, 1], 4)


def test_an_engine_whose_cache_served_another_generation_meanwhile_runs_the_whole_prompt():
    engine = GraphEngine(LayerSkipModel(tiny_llama()), call_directly, smallest_bucket=8)
    prompt_cache = PrefixCache()
    first = decoded(engine, [3, 5, 7], prompt_cache, max_new_tokens=4)
    generate(engine.model, [9, 9, 9, 9], engine=engine, max_new_tokens=4)
    second = decoded(engine, [3, 5, 7], prompt_cache, max_new_tokens=4)
    assert (second.stats.reused, second.tokens) == (0, first.tokens)


def test_a_cache_that_cannot_grow_is_replaced_when_the_text_outgrows_it():
    engine = GraphEngine(LayerSkipModel(tiny_llama()), call_directly, smallest_bucket=8)
    prompt_cache, prompt = PrefixCache(), [3, 5, 7]
    for _ in range(3):
        made = decoded(engine, prompt, prompt_cache, max_new_tokens=10)
        assert made.tokens == decoded_anew(engine, prompt, 10)
        prompt = [*prompt, *made.tokens, 1]
    assert len(prompt) > 32


@given(tokens(6), skip_sets(), draft_exits(), st.integers(1, 14))
@settings(max_examples=30)
def test_rounds_say_which_tokens_were_drafted(tiny, prompt, skip_set, draft_exit, length):
    drafter = LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=draft_exit))
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
