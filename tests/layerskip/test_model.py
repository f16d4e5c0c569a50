"""The stack computes what transformers computes, and with sublayers left out what a plain loop computes."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import LayerSkipModel, SkipSet
from layerskip.errors import InvalidInputError, UnsupportedModelError
from layerskip.kv_cache import KVCache
from layerskip.sublayers import attend
from tests.models import CONTEXT, EVERY_FAMILY, LAYERS, VOCABULARY, WINDOW, reference_logits, tiny_gemma2, tiny_llama
from tests.strategies import skip_sets, tokens

ATOL = 1e-4
TEXT = torch.randint(VOCABULARY, (4 * WINDOW,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.inference_mode()
def logits_of(model, text, skip_set=None, widths=None, capacity=0):
    """All logits of a text that goes through the stack in passes of these widths."""
    cache = model.new_cache(capacity)
    passes = torch.tensor(text, device=model.device).split(widths or [len(text)])
    return torch.cat([model.logits(model.forward(part, cache, skip_set)) for part in passes])


@torch.inference_mode()
def transformers_logits(hf_model, text):
    return hf_model(torch.tensor([text], device=hf_model.device)).logits[0].float()


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


@st.composite
def texts_in_passes(draw, min_size=1, max_size=4 * WINDOW):
    """A text, and the widths of the passes that it is read in."""
    text = draw(tokens(max_size, min_size))
    cuts = sorted(draw(st.sets(st.integers(1, len(text) - 1)))) if len(text) > 1 else []
    return text, [end - start for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(texts_in_passes())
@settings(max_examples=20)
def test_with_nothing_skipped_the_logits_are_those_of_transformers(each_family, text_in_passes):
    text, widths = text_in_passes
    assert_close(logits_of(each_family, text, widths=widths), transformers_logits(each_family.hf_model, text))


@pytest.mark.parametrize("width", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, len(TEXT)])
def test_a_text_longer_than_the_window_may_be_read_in_passes_of_any_width(each_family, width):
    widths = [width] * (len(TEXT) // width) + [len(TEXT) % width] * bool(len(TEXT) % width)
    assert_close(logits_of(each_family, TEXT, widths=widths), transformers_logits(each_family.hf_model, TEXT))


class CallsItPastKeyValues(torch.nn.Module):
    """An attention as transformers has them until 5.23, which keeps what it was called with."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **others):
        self.called_with = position_embeddings, attention_mask, past_key_values, others
        return hidden_states, None


class CallsItCache(torch.nn.Module):
    """The same from 5.24 on."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **others):
        self.called_with = position_embeddings, attention_mask, cache, others
        return hidden_states, None


@pytest.mark.parametrize("kind", [CallsItPastKeyValues, CallsItCache])
def test_attention_gets_the_cache_by_whatever_name_transformers_calls_it(kind):
    same, attention, x, cache = torch.nn.Identity(), kind(), torch.ones(1, 2, 3), KVCache(LAYERS, 4)
    rotary, mask = (x, x), torch.zeros(1, 1, 2, 2)
    assert torch.equal(attend(same, attention, same, x, rotary, mask, cache), 2 * x)
    assert attention.called_with == (rotary, mask, cache, {})


def test_an_empty_skip_set_skips_nothing(each_family):
    assert torch.equal(logits_of(each_family, TEXT, SkipSet(LAYERS)), logits_of(each_family, TEXT))


@given(texts_in_passes(), skip_sets())
@settings(max_examples=30)
def test_with_sublayers_skipped_the_logits_are_those_of_transformers_with_mute_modules(
    each_family, text_in_passes, skip_set
):
    text, widths = text_in_passes
    assert_close(logits_of(each_family, text, skip_set, widths), reference_logits(each_family.hf_model, text, skip_set))


@given(texts_in_passes(min_size=2), skip_sets(), st.data())
@settings(max_examples=20)
def test_a_draft_leaves_no_trace_in_the_cache_once_it_is_rolled_back(each_family, text_in_passes, skip_set, data):
    """Read a part, draft on with sublayers skipped, roll back, read the rest: the same as reading at once."""
    text, _ = text_in_passes
    known = data.draw(st.integers(1, len(text) - 1))
    drafted = data.draw(tokens(4))
    with torch.inference_mode():
        cache = each_family.new_cache(known)
        each_family.forward(torch.tensor(text[:known]), cache)
        for token in drafted:
            each_family.forward(torch.tensor([token]), cache, skip_set)
        assert cache.length == known + len(drafted)
        cache.rollback(known)
        verified = each_family.logits(each_family.forward(torch.tensor(text[known:]), cache))
    assert_close(verified, transformers_logits(each_family.hf_model, text)[known:])


@given(skip_sets(), st.integers(0, 2 * LAYERS))
@settings(max_examples=15)
def test_the_stack_can_be_left_and_entered_at_any_sublayer(each_family, skip_set, at):
    """Below sublayer ``at`` and from it on, one after the other, make the whole pass."""
    text, stack = torch.tensor(TEXT), each_family.stack_of(skip_set)
    with torch.inference_mode():
        whole = each_family.forward(text, each_family.new_cache(len(text)), skip_set)
        context = each_family.pass_context(len(text), each_family.new_cache(len(text)))
        below = stack.run(each_family.embed(text), context, stop=at)
        torch.testing.assert_close(stack.run(below, context, start=at), whole)


@given(skip_sets())
@settings(max_examples=20)
def test_below_the_first_skipped_sublayer_a_draft_is_the_full_model(each_family, skip_set):
    stack = each_family.stack_of(skip_set)
    assert stack.steps[: stack.shared] == each_family.target_stack.steps[: stack.shared]
    assert stack.shared == next((i for i, skipped in enumerate(skip_set.mask) if skipped), 2 * LAYERS)


@given(skip_sets(), st.sets(st.integers(0, VOCABULARY - 1), min_size=1))
@settings(max_examples=20)
def test_a_draft_vocabulary_scores_its_tokens_as_the_whole_head_does(each_family, skip_set, ids):
    chosen = torch.tensor(sorted(ids))
    with torch.inference_mode():
        x = each_family.forward(torch.tensor(TEXT), each_family.new_cache(len(TEXT)), skip_set)
        some = each_family.logits(x, each_family.stack_of(skip_set, token_ids=chosen))
        torch.testing.assert_close(some, each_family.logits(x)[:, chosen])


def test_a_skip_set_for_another_number_of_layers_is_refused(tiny):
    with pytest.raises(InvalidInputError, match=f"is for 9 layers, but the model has {LAYERS}"):
        tiny.stack_of(SkipSet(9, (1,)))


def test_logits_come_in_float32_one_row_a_token(tiny):
    logits = logits_of(tiny, TEXT)
    assert logits.shape == (len(TEXT), VOCABULARY)
    assert logits.dtype == torch.float32


def test_bfloat16_logits_come_in_float32_too():
    model = LayerSkipModel(tiny_gemma2().to(torch.bfloat16))
    assert model.dtype == torch.bfloat16
    logits = logits_of(model, TEXT)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, transformers_logits(model.hf_model, TEXT), atol=0.25, rtol=0)


@pytest.mark.slow
def test_the_default_model_s_logits_are_those_of_transformers(smollm2):
    text = smollm2.tokenizer("Speculative decoding drafts a few tokens and checks them in one pass.").input_ids
    model = LayerSkipModel(smollm2.model)
    expected = transformers_logits(smollm2.model, text)
    assert_close(logits_of(model, text), expected)
    assert_close(logits_of(model, text, widths=[5, 1, 4, len(text) - 10]), expected)


@pytest.mark.slow
def test_the_default_model_without_some_sublayers_is_a_plain_loop_without_them(smollm2):
    text = smollm2.tokenizer("A cat sat on the mat, and then it").input_ids
    skip_set = SkipSet(30, (0, 4, 11, 12, 29), (3, 12, 13))
    ours = logits_of(LayerSkipModel(smollm2.model), text, skip_set, widths=[3, len(text) - 3])
    expected = reference_logits(smollm2.model, text, skip_set)
    # Passes of other widths round otherwise, and with five attentions missing that shows in logits of about 30.
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=1e-4)


# The tests above mean something only because these tiny models feel every part.


def distance(some, others):
    return float((some - others).abs().max())


@pytest.mark.parametrize("index", range(2 * LAYERS))
def test_the_tiny_models_feel_every_sublayer(each_family, index):
    without = SkipSet.from_mask([i == index for i in range(2 * LAYERS)])
    assert distance(logits_of(each_family, TEXT, without), logits_of(each_family, TEXT)) > 1000 * ATOL


# What can be wrapped, and what wrapping leaves alone.


def test_wrapping_says_what_the_model_is(gemma2):
    assert gemma2.num_layers == LAYERS
    assert len(gemma2.sublayers) == 2 * LAYERS
    assert gemma2.vocab_size == VOCABULARY
    assert gemma2.context_length == CONTEXT
    assert gemma2.family.name == "gemma2"
    assert gemma2.device == torch.device("cpu")
    assert gemma2.dtype == torch.float32


@pytest.mark.parametrize(("configured", "expected"), [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_end_tokens_come_from_the_generation_config(configured, expected):
    hf_model = tiny_llama()
    hf_model.generation_config.eos_token_id = configured
    assert LayerSkipModel(hf_model).eos_token_ids == expected


def test_wrapping_and_running_leave_the_model_as_it_was(tiny):
    hf_model = tiny.hf_model
    weights, config = copy.deepcopy(hf_model.state_dict()), copy.deepcopy(hf_model.config.to_dict())
    before = transformers_logits(hf_model, TEXT)
    logits_of(LayerSkipModel(hf_model), TEXT, SkipSet(LAYERS, (0, 2), (1,)))
    assert hf_model.config.to_dict() == config
    assert hf_model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in hf_model.state_dict().items())
    assert torch.equal(transformers_logits(hf_model, TEXT), before)


def test_another_attention_implementation_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"'flex_attention' is not supported.*'eager' or 'sdpa'"):
        LayerSkipModel(tiny_llama(attention="flex_attention"))


def test_training_mode_is_refused():
    with pytest.raises(InvalidInputError, match=r"training mode; call model.eval\(\) first"):
        LayerSkipModel(tiny_llama().train())


def test_a_rope_of_fixed_frequencies_is_welcome():
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = LayerSkipModel(tiny_llama(rope_parameters=rope))
    assert_close(logits_of(model, TEXT), transformers_logits(model.hf_model, TEXT))


@pytest.mark.gpu
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_on_cuda_the_logits_are_those_of_transformers(family):
    model = LayerSkipModel(EVERY_FAMILY[family]().to("cuda"))
    expected = transformers_logits(model.hf_model, TEXT)
    assert_close(logits_of(model, TEXT), expected)
    assert_close(logits_of(model, TEXT, widths=[3, 1, 7, len(TEXT) - 11]), expected)


def test_a_wrapped_model_is_not_wrapped_again(llama):
    with pytest.raises(InvalidInputError, match=r"^model: is wrapped already; pass its hf_model$"):
        LayerSkipModel(llama)


@pytest.mark.parametrize("name", ["smollm2", Path("models/mine")])
def test_the_name_of_a_model_is_refused_with_the_way_to_load_it(name):
    with pytest.raises(InvalidInputError) as error:
        LayerSkipModel(name)
    assert str(error.value) == (
        f"model: expected a loaded model, got the name '{name}'; load it: layerskip.load_checkpoint(name).model"
    )


def test_what_is_no_model_is_refused(llama):
    with pytest.raises(InvalidInputError, match=r"^model: expected a Hugging Face model, got LlamaConfig$"):
        LayerSkipModel(llama.config)
