"""``profile.as_assistant(model)``: the draft as a model of its own, which ``generate(assistant_model=...)`` takes."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from layerskip import AdaptiveThreshold, ConfidenceThreshold, FixedLength, LayerSkipModel, SkipSet
from layerskip.drafting.bridges import fit_bridges
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError, InvalidProfileError, UnsupportedModelError
from layerskip.kv_cache import CACHE_NAMES
from tests.layerskip.test_transformers_integration import profile_for, state_of
from tests.models import (
    EVERY_FAMILY,
    FAMILIES,
    LAYERS,
    WINDOW,
    near_tie_or_same,
    random_layers,
    reference_logits,
    tiny_llama,
    transformers_greedy,
)
from tests.strategies import skip_sets, tokens

PROMPT = [1, 2, 3]
SKIPPED = SkipSet(LAYERS, (0, 2), (1,))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


def assisted(model, assistant, length=40, **arguments):
    found = model.generate(
        torch.tensor([PROMPT]),
        assistant_model=assistant,
        max_new_tokens=length,
        pad_token_id=0,
        **{"do_sample": False} | arguments,
    )
    return found[0, len(PROMPT) :].tolist()


attentive = skip_sets().filter(lambda skip_set: len(skip_set.attention) < LAYERS)


@given(family=st.sampled_from(sorted(EVERY_FAMILY)), skip_set=attentive, text=tokens(4 * WINDOW))
@settings(max_examples=60)
def test_its_logits_are_those_of_the_draft(family, skip_set, text):
    model = EVERY_FAMILY[family]()
    assistant = profile_for(model, skip_set).as_assistant(model)
    with torch.inference_mode():
        logits = assistant(torch.tensor([text])).logits[0]
    torch.testing.assert_close(logits, reference_logits(model, text, skip_set), rtol=0, atol=1e-5)


@given(family=st.sampled_from(sorted(FAMILIES)), skip_set=attentive)
@settings(max_examples=15)
def test_assisted_greedy_tokens_are_those_of_plain_decoding(family, skip_set):
    """Beyond Gemma-2's window as well, and whether or not attention 0 is kept."""
    model = FAMILIES[family]()
    found = assisted(model, profile_for(model, skip_set).as_assistant(model))
    near_tie_or_same(model, PROMPT, found, transformers_greedy(model, PROMPT, 40))


def test_it_generates_by_itself_with_and_without_its_cache(model):
    """Its cache counts positions right, although layers lack an attention."""
    assistant = profile_for(model, SKIPPED).as_assistant(model)
    texts = [
        assistant.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, pad_token_id=0, use_cache=cached)
        for cached in (True, False)
    ]
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_a_layer_of_it_writes_to_the_cache_by_whatever_name_transformers_calls_it(model, name):
    body = profile_for(model, SKIPPED).as_assistant(model).model
    x, cache = torch.ones(1, 3, model.config.hidden_size), DynamicCache()
    body.layers[0](x, position_embeddings=body.rotary_emb(x, torch.arange(3)[None]), **{name: cache})
    assert cache.get_seq_length() == 3


def test_an_assistant_that_skips_nothing_is_always_right(model):
    """So what is accepted of others tells of what they skip, and of nothing else."""
    assistant = profile_for(model, SkipSet(LAYERS, (), ()), FixedLength(4)).as_assistant(model)
    widths = []
    hook = model.register_forward_pre_hook(
        lambda _, arguments, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    assisted(model, assistant, length=20)
    hook.remove()
    assert widths == [len(PROMPT) + 4, 5, 5, 5]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_assistant_runs_at_the_precision_of_the_draft(model, precision):
    """In passes of some length, which run on dequantized weights, and in decoding."""
    wrapper, text = LayerSkipModel(model), torch.arange(3, 23)
    for skip_set in (SkipSet(LAYERS), SkipSet(LAYERS, (2,), (1,))):
        profile = profile_for(model, skip_set, FixedLength(4), precision=precision)
        with torch.inference_mode():
            stack = wrapper.stack_of(skip_set, precision=precision)
            context = wrapper.pass_context(len(text), wrapper.new_cache(len(text)))
            drafted = wrapper.logits(stack.run(wrapper.embed(text), context), stack)
            logits = profile.as_assistant(model)(text[None]).logits[0]
        torch.testing.assert_close(logits, drafted, rtol=0, atol=0.05)
        near_tie_or_same(
            model, PROMPT, assisted(model, profile.as_assistant(model)), transformers_greedy(model, PROMPT, 40)
        )


def test_bridges_stand_in_for_what_is_skipped(model):
    wrapper = LayerSkipModel(model)
    skip_set = SkipSet(LAYERS, (1, 2), (0, 1, 2))
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(64, (8, 40), generator=generator).tolist()
    bridges = fit_bridges(wrapper, texts, skip_set)
    assert bridges
    profile = profile_for(model, skip_set, weights=DraftWeights(bridges=bridges))
    with torch.inference_mode():
        x = wrapper.embed(torch.tensor(texts[0]))
        stack = wrapper.stack_of(skip_set, stand_ins=DraftWeights(bridges=bridges).steps)
        drafted = wrapper.logits(stack.run(x, wrapper.pass_context(40, wrapper.new_cache(40))))
        logits = profile.as_assistant(model)(torch.tensor(texts[:1])).logits[0]
        plain = profile_for(model, skip_set).as_assistant(model)(torch.tensor(texts[:1])).logits[0]
    torch.testing.assert_close(logits, drafted, rtol=0, atol=1e-5)
    assert (logits - plain).abs().max() > 0.1
    near_tie_or_same(
        model, PROMPT, assisted(model, profile.as_assistant(model)), transformers_greedy(model, PROMPT, 40)
    )


@pytest.mark.parametrize(("runs", "like"), [({2: 2 * LAYERS}, 0), ({3: 6}, 1), ({1: 3, 5: 7}, 0), ({0: 2}, 1)], ids=str)
def test_trained_layers_stand_in_for_what_is_skipped(model, runs, like):
    """Gemma-2's layers 0 and 1 differ by their window."""
    wrapper = LayerSkipModel(model)
    layers = random_layers(wrapper, runs, like=like)
    skip_set = SkipSet.from_mask([any(start <= i < stop for start, stop in runs.items()) for i in range(2 * LAYERS)])
    profile = profile_for(model, skip_set, weights=DraftWeights(layers=layers))
    text = torch.randint(64, (4 * WINDOW,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stack = wrapper.stack_of(skip_set, stand_ins=profile.weights(wrapper).steps)
        context = wrapper.pass_context(len(text), wrapper.new_cache(len(text)))
        drafted = wrapper.logits(stack.run(wrapper.embed(text), context))
        logits = profile.as_assistant(model)(text[None]).logits[0]
    torch.testing.assert_close(logits, drafted, rtol=0, atol=1e-4)
    near_tie_or_same(
        model, PROMPT, assisted(model, profile.as_assistant(model)), transformers_greedy(model, PROMPT, 40)
    )


def test_a_draft_whose_only_attention_is_a_trained_layer_s_can_be_an_assistant(model):
    layers = random_layers(LayerSkipModel(model), {2: 2 * LAYERS})
    skip_set = SkipSet(LAYERS, range(LAYERS), range(1, LAYERS))
    assistant = profile_for(model, skip_set, weights=DraftWeights(layers=layers)).as_assistant(model)
    near_tie_or_same(model, PROMPT, assisted(model, assistant), transformers_greedy(model, PROMPT, 40))


def test_a_draft_vocabulary_is_left_out(model):
    profile = profile_for(model, SKIPPED, weights=DraftWeights(token_ids=torch.arange(5)))
    text = torch.tensor([PROMPT])
    with torch.inference_mode():
        whole = profile_for(model, SKIPPED).as_assistant(model)(text).logits
        assert torch.equal(profile.as_assistant(model)(text).logits, whole)


def test_sampling_with_it_works(model):
    assistant = profile_for(model, SKIPPED).as_assistant(model)
    torch.manual_seed(0)
    assert len(assisted(model, assistant, do_sample=True, temperature=2.0)) == 40


def test_it_shares_every_weight_and_leaves_out_what_is_skipped(model):
    assistant = profile_for(model, SKIPPED).as_assistant(model)
    own, shared = set(map(id, model.parameters())), set(map(id, assistant.parameters()))
    assert shared < own
    skipped = [model.model.layers[2].self_attn, model.model.layers[1].mlp]
    assert not shared & {id(weight) for part in skipped for weight in part.parameters()}
    assert {id(weight) for weight in model.model.layers[3].self_attn.parameters()} < shared


def test_the_model_is_left_exactly_as_it_was(model):
    text = torch.tensor([[5, 6, 7, 8]])
    before, logits = state_of(model), model(text).logits
    assistant = profile_for(model, SKIPPED).as_assistant(model)
    assisted(model, assistant)
    assistant(text, output_hidden_states=True, output_attentions=True)  # hooks the assistant's own modules
    assistant.generation_config.max_length = 7
    assistant.config.vocab_size = 1
    assert state_of(model) == before
    assert torch.equal(model(text).logits, logits)


def test_it_does_not_keep_what_it_does_not_use():
    model = tiny_llama()
    assistant = profile_for(model, SKIPPED).as_assistant(model)
    left_out = weakref.ref(model.model.layers[1].mlp.up_proj.weight)
    del model
    gc.collect()
    assert left_out() is None
    assert assistant(torch.tensor([PROMPT])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("draft_exit", "tokens", "threshold"),
    [
        (FixedLength(3), 3, 0),
        (ConfidenceThreshold(0.7, max_length=6), 6, 0.7),
        (AdaptiveThreshold(0.4, max_length=5), 5, 0.4),
    ],
    ids=str,
)
def test_generate_lets_it_propose_as_the_profile_says(draft_exit, tokens, threshold):
    model = tiny_llama()
    config = profile_for(model, SKIPPED, draft_exit).as_assistant(model).generation_config
    assert config.num_assistant_tokens == tokens
    assert config.num_assistant_tokens_schedule == "constant"
    assert config.assistant_confidence_threshold == threshold


def test_a_draft_without_attention_is_an_error():
    model = tiny_llama()
    profile = profile_for(model, SkipSet(LAYERS, range(LAYERS), ()))
    with pytest.raises(InvalidInputError, match=r"every attention.*layerskip\.speculate"):
        profile.as_assistant(model)


def test_another_model_is_an_error():
    with pytest.raises(InvalidProfileError, match="intermediate_size"):
        profile_for(tiny_llama()).as_assistant(tiny_llama(intermediate_size=16))


@pytest.mark.parametrize("part", ["", "model", "model.layers.1.self_attn"])
def test_a_part_with_a_forward_of_its_own_is_an_error(part):
    model = tiny_llama()
    module = model.get_submodule(part)
    module.forward = module.forward  # as accelerate's hooks do
    with pytest.raises(UnsupportedModelError, match=rf"{type(module).__name__} has a forward of its own"):
        profile_for(model).as_assistant(model)


def test_a_module_that_was_compiled_in_place_is_not_called_in_its_stead():
    model = tiny_llama()
    called = []
    model._compiled_call_impl = lambda *inputs, **others: called.append(inputs)
    profile_for(model).as_assistant(model)(torch.tensor([PROMPT]))
    assert not called
