"""``generate(custom_generate=speculate(profile))`` gives what ``generate`` gives, and leaves the model as it was."""

import gc
import inspect
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.models.llama.modeling_llama import LlamaAttention

from layerskip import DraftProfile, FixedLength, LayerSkipModel, SkipSet, speculate
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import load_costs
from layerskip.errors import InvalidInputError, InvalidProfileError, UnsupportedModelError
from layerskip.fingerprint import identify
from layerskip.kv_cache import CACHE_NAMES
from layerskip.packed_linear import packing_available
from tests.layerskip.test_profile import a_profile
from tests.models import CONTEXT, FAMILIES, LAYERS, VOCABULARY, tiny_llama, tiny_tokenizer
from tests.strategies import draft_exits, skip_sets, tokens

PROMPT = torch.tensor([[1, 2, 3]])
SKIPPED = SkipSet(LAYERS, (2,), (1,))
LENGTH = 24


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def llama_model():
    return tiny_llama()


def profile_for(model, skip_set=SKIPPED, stopping=FixedLength(3), weights=None, precision="full"):  # noqa: B008
    identity = identify(LayerSkipModel(model))
    draft = {"skip_set": skip_set, "stopping": stopping, "precision": precision}
    return a_profile(weights, model=identity, measured=None, **draft)


def generate(model, prompt=PROMPT, **arguments):
    return model.generate(prompt, **{"max_new_tokens": LENGTH, "pad_token_id": 0, "do_sample": False} | arguments)


def greedy(model, **arguments):
    return generate(model, **arguments)[0, PROMPT.shape[1] :].tolist()


# The same tokens


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_draft_at_lower_precision_gives_the_same_tokens(model, precision):
    for skip_set in (SkipSet(LAYERS), SKIPPED):
        decode = speculate(profile_for(model, skip_set, precision=precision))
        output = generate(model, custom_generate=decode, return_dict_in_generate=True)
        assert output.sequences[0, PROMPT.shape[1] :].tolist() == greedy(model)
        assert output.stats.drafted


def test_a_profile_may_be_a_file_or_have_a_name(tmp_path):
    a_profile().save(tmp_path / "profile.json")
    assert speculate(tmp_path / "profile.json").profile == a_profile()
    assert speculate("smollm2").profile.model.id == "smollm2"


def test_drafts_of_one_precision_share_their_copies(llama_model):
    for skip_set in (SkipSet(LAYERS), SkipSet(LAYERS, (1,))):
        engine = speculate(profile_for(llama_model, skip_set, precision="int8")).prepare(llama_model)
        copies = engine.model.copies
        assert copies.nbytes == copies.bytes_needed("int8")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": [[7], [24], [9, 58]]},
        {"sequence_bias": [[[44], -10.0], [[1, 2], 5.0]]},
        {"suppress_tokens": [24, 61]},
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (3, 2.0), "eos_token_id": 11},
        {"renormalize_logits": True},
        {"guidance_scale": 1.5},  # keeps a cache of its own from call to call
        {"prefix_allowed_tokens_fn": lambda _, ids: [(int(ids[-1]) * 5 + k) % VOCABULARY for k in range(6)]},
        {"max_new_tokens": 1},
        {"max_length": 9, "max_new_tokens": None},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=lambda rules: (
        ", ".join(f"{name} {value}" for name, value in rules.items() if not callable(value)) or "a function"
    ),
)
def test_greedy_tokens_are_those_of_generate(model, arguments):
    assert greedy(model, **arguments, custom_generate=speculate(profile_for(model))) == greedy(model, **arguments)


penalties = st.floats(0.5, 2).filter(lambda penalty: penalty != 0)
rules = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 20)},
    optional={
        "repetition_penalty": penalties,
        "no_repeat_ngram_size": st.integers(1, 3),
        "encoder_repetition_penalty": penalties,
        "bad_words_ids": st.lists(tokens(3), min_size=1, max_size=4, unique_by=tuple),
        "suppress_tokens": tokens(20),
        "begin_suppress_tokens": tokens(20),
        "renormalize_logits": st.just(True),
    },
)
endings = st.fixed_dictionaries(
    {"eos_token_id": tokens(8)}, optional={"min_new_tokens": st.integers(0, 12), "forced_eos_token_id": tokens(1)}
)


@given(tokens(12), rules, st.just({}) | endings, skip_sets(), draft_exits(), st.none() | st.integers(1, VOCABULARY))
@settings(max_examples=60)
def test_greedy_tokens_are_those_of_generate_under_any_rules(prompt, rules, ending, skip_set, draft_exit, vocabulary):
    model = tiny_llama()
    prompt = torch.tensor([prompt])
    arguments = rules | ending | {"attention_mask": torch.ones_like(prompt)}  # no token of it is padding
    assets = None if vocabulary is None else DraftWeights(token_ids=torch.arange(vocabulary))
    profile = profile_for(model, skip_set, draft_exit, assets)
    expected = generate(model, prompt, **arguments)
    assert generate(model, prompt, **arguments, custom_generate=speculate(profile)).tolist() == expected.tolist()


class Log(LogitsProcessor, StoppingCriteria):
    """Notes every call, and forbids the token with the number of the call, so that a call too many changes the text."""

    def __init__(self):
        self.calls = []

    def criterion(self, input_ids, scores):
        self.calls.append(("criterion", input_ids.tolist(), scores is not None))
        return torch.zeros(1, dtype=torch.bool)

    def __call__(self, input_ids, scores):
        self.calls.append(("processor", input_ids.tolist(), scores.shape))
        scores[:, len(self.calls) * 7 % VOCABULARY] = -torch.inf
        return scores


class Criterion(StoppingCriteria):
    def __init__(self, rule):
        self._rule = rule

    def __call__(self, input_ids, scores, **others):
        return self._rule(input_ids, scores)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("end_at", [None, 8, 9, 10, 11])
def test_processors_and_criteria_see_the_calls_of_generate_s_own_loop(llama_model, do_sample, end_at):
    """Once a token, in order, none for drafts: so that those that keep a state, such as grammars, work."""

    def calls(**arguments):
        log = Log()
        generate(
            llama_model,
            logits_processor=LogitsProcessorList([log]),
            stopping_criteria=StoppingCriteriaList([Criterion(log.criterion)]),
            do_sample=do_sample,
            top_k=1,
            **arguments,
        )
        return log.calls

    expected = calls()
    ending = {}
    if end_at is not None:
        end = expected[2 * end_at + 1][1][0][-1]
        expected = calls(eos_token_id=end)
        ending = {"eos_token_id": end}
    assert calls(**ending, custom_generate=speculate(profile_for(llama_model))) == expected
    assert len(expected) > 4


def test_a_drafted_text_is_accepted_under_processors(llama_model):
    """A draft that skips nothing agrees with the target model only if its own scores are processed as well."""
    decode = speculate(profile_for(llama_model, SkipSet(LAYERS, (), ())))
    out = generate(
        llama_model,
        no_repeat_ngram_size=1,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        custom_generate=decode,
    )
    assert out.stats.drafted == out.stats.accepted > 0


# Endings


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.2}], ids=["no rules", "rules"])
def test_an_end_of_sequence_token_ends_the_text_wherever_in_a_round_it_comes(llama_model, at, rules):
    end = greedy(llama_model, **rules)[at]
    expected = greedy(llama_model, **rules, eos_token_id=[end, 63])
    assert expected[-1] == end
    decode = speculate(profile_for(llama_model))
    assert greedy(llama_model, **rules, eos_token_id=[end, 63], custom_generate=decode) == expected


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.2}], ids=["no rules", "rules"])
def test_a_stopping_criterion_ends_the_text_wherever_in_a_round_it_holds(llama_model, at, rules):
    criteria = StoppingCriteriaList([Criterion(lambda ids, _: torch.tensor([ids.shape[1] == PROMPT.shape[1] + at]))])
    found = greedy(
        llama_model, **rules, stopping_criteria=criteria, custom_generate=speculate(profile_for(llama_model))
    )
    assert found == greedy(llama_model, **rules)[:at]


def test_a_caller_s_own_largest_length_counts(llama_model):
    criteria = StoppingCriteriaList([MaxLengthCriteria(8)])
    decode = speculate(profile_for(llama_model))
    assert len(greedy(llama_model, stopping_criteria=criteria, custom_generate=decode)) == 8 - PROMPT.shape[1]


def test_criteria_see_the_scores_that_generate_shows_them(llama_model):
    arguments = {"return_dict_in_generate": True, "output_scores": True}
    best = [float(scores.max()) for scores in generate(llama_model, **arguments).scores]
    second, highest = sorted(best)[-2:]
    criterion = Criterion(lambda _, scores: scores[-1].max(-1).values > (second + highest) / 2)
    found = generate(
        llama_model,
        **arguments,
        stopping_criteria=StoppingCriteriaList([criterion]),
        custom_generate=speculate(profile_for(llama_model)),
    )
    assert found.sequences.shape[1] - PROMPT.shape[1] == best.index(highest) + 1 < LENGTH


def test_the_context_s_end_ends_the_text_with_a_warning(llama_model):
    decode = speculate(profile_for(llama_model))
    with pytest.warns(UserWarning, match=f"context of {CONTEXT} is full") as warned:
        found = generate(llama_model, max_new_tokens=2 * CONTEXT, custom_generate=decode)
    assert found.shape[1] == CONTEXT + 1
    assert warned[0].filename == __file__


@pytest.fixture(scope="module")
def talker():
    """A model and its tokenizer."""
    tokenizer = tiny_tokenizer()
    return tiny_llama(vocab_size=len(tokenizer)), tokenizer


def characters_of(text, tokenizer):
    """The whole characters among some tokens."""
    return [string for token in text if (string := tokenizer.decode([token])).isascii()]


class TestStopStrings:
    @pytest.mark.parametrize("several", [True, False])
    def test_end_the_text_where_they_do_in_generate(self, talker, several):
        model, tokenizer = talker
        string = characters_of(greedy(model), tokenizer)[1]
        strings = ["never", string] if several else string
        expected = greedy(model, stop_strings=strings, tokenizer=tokenizer)
        assert len(expected) < LENGTH
        decode = speculate(profile_for(model), tokenizer=tokenizer)
        assert greedy(model, stop_strings=strings, custom_generate=decode) == expected

    def test_may_be_asked_for_with_generate_s_tokenizer_as_well(self, talker):
        model, tokenizer = talker
        decode = speculate(profile_for(model), tokenizer=tokenizer)
        string = characters_of(greedy(model), tokenizer)[1]
        expected = greedy(model, stop_strings=string, tokenizer=tokenizer)
        assert greedy(model, stop_strings=string, tokenizer=tokenizer, custom_generate=decode) == expected

    def test_without_a_tokenizer_say_where_it_belongs(self, talker):
        model, tokenizer = talker
        with pytest.raises(InvalidInputError, match=r"stop_strings: .*speculate\(profile, tokenizer=tokenizer\)"):
            greedy(model, stop_strings="a", tokenizer=tokenizer, custom_generate=speculate(profile_for(model)))


# What comes out


@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 1}], ids=str)
def test_scores_and_logits_are_those_of_generate(model, rules):
    arguments = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True} | rules
    expected = generate(model, **arguments)
    found = generate(model, **arguments, custom_generate=speculate(profile_for(model)))
    assert found.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(found[name]) == LENGTH
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
            assert not ours.is_inference()


def test_only_what_is_asked_for_is_returned(llama_model):
    decode = speculate(profile_for(llama_model))
    found = generate(llama_model, return_dict_in_generate=True, output_logits=True, custom_generate=decode)
    assert set(found) == {"sequences", "logits", "stats"}
    assert found.stats.tokens == LENGTH
    assert torch.is_tensor(generate(llama_model, output_scores=True, custom_generate=decode))


class Collector(BaseStreamer):
    def __init__(self):
        self.put_values, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.put_values.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_a_streamer_gets_what_generate_would_give_it(llama_model, rules):
    theirs, ours = Collector(), Collector()
    generate(llama_model, **rules, streamer=theirs)
    generate(llama_model, **rules, custom_generate=speculate(profile_for(llama_model), streamer=ours))
    assert [value.tolist() for value in ours.put_values] == [value.tolist() for value in theirs.put_values]
    assert ours.ended == theirs.ended == 1


def test_transformers_own_streamers_work(talker, capsys):
    model, tokenizer = talker
    text = tokenizer.decode(greedy(model))
    profile = profile_for(model)
    generate(model, custom_generate=speculate(profile, streamer=TextStreamer(tokenizer, skip_prompt=True)))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    worker = threading.Thread(
        target=generate, args=(model,), kwargs={"custom_generate": speculate(profile, streamer=streamer)}
    )
    worker.start()
    assert "".join(streamer) == text
    worker.join()


# Sampling


def test_sampling_repeats_after_a_seed(llama_model):
    decode = speculate(profile_for(llama_model))
    for rules in ({}, {"repetition_penalty": 1.1}):
        texts = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append(greedy(llama_model, do_sample=True, temperature=3.0, **rules, custom_generate=decode))
        assert texts[0] == texts[1] != texts[2]


def test_sampling_settings_are_applied_once(llama_model):
    """A temperature of 0.5 twice would be one of 0.25; scores tell."""
    found = generate(
        llama_model,
        do_sample=True,
        temperature=0.5,
        top_k=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        custom_generate=speculate(profile_for(llama_model)),
    )
    for scores, logits in zip(found.scores, found.logits, strict=True):
        torch.testing.assert_close(scores, 2 * logits)


class Forbids(LogitsProcessor):
    """Nothing is allowed behind the first token."""

    def __call__(self, input_ids, scores):
        return scores if input_ids.shape[1] == PROMPT.shape[1] else torch.full_like(scores, -torch.inf)


def test_sampling_from_nothing_is_an_error(llama_model):
    with pytest.raises(InvalidInputError, match="left nothing to draw from"):
        generate(
            llama_model,
            do_sample=True,
            logits_processor=LogitsProcessorList([Forbids()]),
            custom_generate=speculate(profile_for(llama_model)),
        )


def test_rules_may_leave_a_draft_nothing_to_propose(llama_model):
    """The draft's vocabulary is one token, and that is suppressed."""
    decode = speculate(profile_for(llama_model, weights=DraftWeights(token_ids=torch.tensor([5]))))
    for do_sample in (False, True):
        found = greedy(llama_model, suppress_tokens=[5], do_sample=do_sample, top_k=1, custom_generate=decode)
        assert found == greedy(llama_model, suppress_tokens=[5])


# The model stays as it was


def state_of(model):
    """All that there is to a model: its modules' attributes down to hooks and weights, and its settings."""
    parts = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            inside = {key: id(part) for key, part in value.items()} if isinstance(value, dict) else None
            parts[name, attribute] = id(value), inside
    weights = {name: (weight.data_ptr(), weight._version) for name, weight in model.state_dict().items()}
    return parts, weights, model.config.to_dict(), model.generation_config.to_dict(), model.training


class BreakError(Exception):
    pass


class BreakingStreamer(Collector):
    def put(self, value):
        super().put(value)
        if len(self.put_values) == 6:
            raise BreakError


def break_later(ids, _):
    if ids.shape[1] == 9:
        raise BreakError
    return torch.tensor([False])


class BreakingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        break_later(input_ids, None)
        return scores


@pytest.mark.parametrize(
    ("streamer", "arguments"),
    [
        (None, {}),
        (None, {"repetition_penalty": 1.2, "do_sample": True}),
        (BreakingStreamer, {}),
        (None, {"stopping_criteria": StoppingCriteriaList([Criterion(break_later)])}),
        (None, {"logits_processor": LogitsProcessorList([BreakingProcessor()])}),
    ],
    ids=["greedy", "sampling", "streamer breaks", "criterion breaks", "processor breaks"],
)
def test_the_model_is_left_exactly_as_it_was(model, streamer, arguments):
    before, expected = state_of(model), greedy(model)
    decode = speculate(profile_for(model), streamer=streamer and streamer())
    if streamer or arguments.keys() & {"stopping_criteria", "logits_processor"}:
        with pytest.raises(BreakError):
            generate(model, **arguments, custom_generate=decode)
    else:
        generate(model, **arguments, custom_generate=decode)
    assert state_of(model) == before
    assert greedy(model) == expected
    assert greedy(model, custom_generate=decode) == expected


def test_the_caller_s_settings_are_left_as_they_were(llama_model):
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    criteria, before = StoppingCriteriaList(), settings.to_dict()
    found = llama_model.generate(
        PROMPT,
        generation_config=settings,
        stopping_criteria=criteria,
        custom_generate=speculate(profile_for(llama_model)),
    )
    assert found[0, 3:].tolist() == greedy(llama_model)[:5]
    assert settings.to_dict() == before
    assert criteria == []


# Wrapped once


@pytest.fixture
def checks(monkeypatch):
    """Counts checks of profiles against models."""
    counted = []
    check = DraftProfile.check
    monkeypatch.setattr(DraftProfile, "check", lambda self, model: (counted.append(self), check(self, model))[1])
    return counted


def test_a_profile_is_checked_once_for_a_model(tmp_path, checks):
    model = tiny_llama()
    path = tmp_path / "profile.json"
    profile_for(model).save(path)
    for _ in range(3):
        generate(model, custom_generate=speculate(str(path)))
        generate(model, custom_generate=speculate(path))
    assert len(checks) == 1
    generate(model, custom_generate=speculate(profile_for(model, SkipSet(LAYERS, (), (2,)))))
    assert len(checks) == 2


@pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")
def test_packed_weights_are_opt_in_and_leave_the_model_as_it_was(model):
    before = [(name, id(weight)) for name, weight in model.named_parameters()]
    decode = speculate(profile_for(model), engine="packed")
    assert decode.prepare(model).name == "packed"
    assert decode.prepare(model) is decode.prepare(model)
    assert speculate(profile_for(model)).prepare(model).name == "eager"
    assert greedy(model, custom_generate=decode) == greedy(model)
    assert [(name, id(weight)) for name, weight in model.named_parameters()] == before


def test_a_changed_model_is_checked_and_wrapped_anew(checks):
    model = tiny_llama()
    decode = speculate(profile_for(model))
    engine = decode.prepare(model)
    assert decode.prepare(model) is engine
    model.bfloat16()
    assert decode.prepare(model) is not engine
    assert len(greedy(model, custom_generate=decode)) == LENGTH
    assert len(checks) == 2
    model.set_attn_implementation("eager")
    assert decode.prepare(model).model.config._attn_implementation == "eager"
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert greedy(model, custom_generate=decode) == greedy(model)  # a profile fits other weights, too


def test_a_prepared_engine_is_the_one_that_generations_use(tmp_path):
    model = tiny_llama()
    decode = speculate(profile_for(model))
    engine = decode.prepare(model)
    engine.costs = load_costs(engine, tmp_path)
    assert greedy(model, custom_generate=decode) == greedy(model)
    assert decode.prepare(model).costs is not None


def test_what_is_kept_does_not_keep_the_model():
    model = tiny_llama()
    decode = speculate(profile_for(model, weights=DraftWeights(token_ids=torch.arange(9))))
    generate(model, custom_generate=decode)
    gc.collect()
    references = [weakref.ref(model), *(weakref.ref(weight) for weight in model.parameters())]
    gc.disable()
    try:
        del model
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


def test_generations_at_the_same_time_do_not_disturb_one_another(llama_model):
    decode = speculate(profile_for(llama_model, stopping=a_profile().stopping))
    expected = greedy(llama_model)
    found = []
    workers = [
        threading.Thread(target=lambda: found.append(greedy(llama_model, custom_generate=decode))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 4


# What cannot be


# As the installed transformers calls it.
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaAttention.forward).parameters)


def used_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    return cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences: .* got 2"),
        ({"prompt": PROMPT.repeat(2, 1)}, "input_ids: .* a batch of 2"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask: hides"),
        ({"prompt": torch.tensor([[0, 2, 3]])}, "attention_mask: hides"),  # 0 is the padding token
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds: "),
        ({"position_ids": torch.tensor([[4, 5, 6]])}, "position_ids: "),
        ({CACHE: DynamicCache()}, f"^{CACHE}: "),
        ({CACHE: used_cache()}, f"^{CACHE}: "),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions: "),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_layerskip_cannot_do_is_an_error_that_names_it(llama_model, arguments, message):
    arguments = dict(arguments)
    prompt = arguments.pop("prompt", PROMPT)
    with pytest.raises(InvalidInputError, match=message) as error:
        generate(llama_model, prompt, **arguments, custom_generate=speculate(profile_for(llama_model)))
    assert "\n" not in str(error.value)


def test_a_mask_of_ones_is_no_padding(llama_model):
    prompt = torch.tensor([[0, 2, 3]])
    arguments = {"attention_mask": torch.ones_like(prompt)}
    decode = speculate(profile_for(llama_model))
    found = generate(llama_model, prompt, **arguments, custom_generate=decode)
    assert found.tolist() == generate(llama_model, prompt, **arguments).tolist()


def test_a_model_in_training_mode_is_an_error():
    model = tiny_llama()
    decode = speculate(profile_for(model))
    generate(model, custom_generate=decode)
    model.train()
    with pytest.raises(InvalidInputError, match=r"call model.eval\(\)"):
        generate(model, custom_generate=decode)
    assert model.training


def test_another_model_is_an_error(llama_model):
    with pytest.raises(InvalidProfileError, match="intermediate_size"):
        generate(tiny_llama(intermediate_size=16), custom_generate=speculate(profile_for(llama_model)))


def test_a_model_of_another_kind_is_an_error(llama_model):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).eval()
    with pytest.raises(UnsupportedModelError, match="'t5' is not supported"):
        generate(model, custom_generate=speculate(profile_for(llama_model)))


def test_a_file_that_is_not_there_is_an_error_at_once(tmp_path):
    with pytest.raises(InvalidProfileError, match=r"nothing\.json: cannot read"):
        speculate(tmp_path / "nothing.json")
