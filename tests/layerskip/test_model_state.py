"""What is attached to a model, or changed in it, is honoured or refused, never ignored."""

import copy
from contextlib import nullcontext
from itertools import pairwise
from types import MethodType

import pytest
import torch
from torch import nn

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate, speculate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import GraphEngine, PackedEngine
from layerskip.errors import InvalidInputError, UnsupportedModelError
from layerskip.packed_linear import packing_available
from layerskip.prefix_cache import PrefixCache
from tests.capture import call_directly
from tests.layerskip.test_profile import profile_for
from tests.models import LAYERS, near_tie_or_same, tiny_llama, transformers_greedy

PROMPT = [1, 2, 3, 9, 4]


def shifted(module, args, output):
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


def drop_inputs(module, args, kwargs):
    return args, kwargs


class Wrapper(nn.Module):
    """Hands its attributes on, as libraries that steer models do."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return shifted(self, args, self.block(*args, **kwargs))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)


def patch(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: shifted(module, args, original(*args, **kwargs))


def wrap_layer(model):
    model.model.layers[1] = Wrapper(model.model.layers[1])


def override_class(model):
    layer = model.model.layers[1]

    class Steered(type(layer)):
        def forward(self, *args, **kwargs):
            return shifted(self, args, super().forward(*args, **kwargs))

    layer.__class__ = Steered


ATTACHED = {
    "a hook of a layer": (
        lambda m: m.model.layers[1].register_forward_hook(shifted),
        "model.layers.1: has a forward hook",
    ),
    "a hook before a layer": (
        lambda m: m.model.layers[1].register_forward_pre_hook(drop_inputs, with_kwargs=True),
        "model.layers.1: has a forward hook",
    ),
    "a hook of the decoder": (lambda m: m.model.register_forward_hook(drop_inputs), "model: has a forward hook"),
    "a hook of the model": (lambda m: m.register_forward_hook(drop_inputs), "the model: has a forward hook"),
    "a layer's own forward": (lambda m: patch(m.model.layers[1]), "model.layers.1: has a forward of its own"),
    "the decoder's own forward": (lambda m: patch(m.model), "model: has a forward of its own"),
    "the model's own forward": (lambda m: patch(m), "the model: has a forward of its own"),
    "a wrapper around a layer": (wrap_layer, "model.layers.1: has a class of its own (Wrapper)"),
    "a layer's own class": (override_class, "model.layers.1: has a class of its own (Steered)"),
}


@pytest.mark.parametrize(("attach", "message"), ATTACHED.values(), ids=ATTACHED)
def test_what_would_not_run_is_refused_and_named(attach, message):
    model = tiny_llama()
    profile = profile_for(LayerSkipModel(tiny_llama()))
    attach(model)
    for call in (
        lambda: LayerSkipModel(model),
        lambda: model.generate(torch.tensor([PROMPT]), custom_generate=speculate(profile), max_new_tokens=4),
    ):
        with pytest.raises(UnsupportedModelError) as refused:
            call()
        assert str(refused.value).startswith(f"{message}, which would not run")
        assert "profile.as_assistant(model)" in str(refused.value)


@pytest.mark.parametrize("attach", [ATTACHED[name][0] for name in ATTACHED if "class" not in name])
def test_it_is_refused_too_where_it_comes_after_the_model_was_wrapped(attach):
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    profile = profile_for(wrapper)
    generate(wrapper, PROMPT, max_new_tokens=2)
    model.generate(torch.tensor([PROMPT]), custom_generate=speculate(profile), max_new_tokens=2)
    attach(model)
    with pytest.raises(UnsupportedModelError):
        generate(wrapper, PROMPT, max_new_tokens=2)
    with pytest.raises(UnsupportedModelError):
        model.generate(torch.tensor([PROMPT]), custom_generate=speculate(profile), max_new_tokens=2)


def test_a_layer_in_a_wrapper_that_hands_nothing_on_is_named():
    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs)

    model = tiny_llama()
    model.model.layers[1] = Block(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: has a class of its own \(Block\)"):
        LayerSkipModel(model)


def test_an_assistant_works_with_what_is_attached():
    """transformers calls the model itself; only the draft does without the hook."""
    model = tiny_llama()
    profile = profile_for(LayerSkipModel(model))
    model.model.layers[1].register_forward_hook(shifted)
    expected = transformers_greedy(model, PROMPT, 12)
    ids = torch.tensor([PROMPT])
    ours = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=profile.as_assistant(model),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    near_tie_or_same(model, PROMPT, ours[0, len(PROMPT) :].tolist(), expected)


def test_a_hook_that_was_removed_is_no_matter():
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    handle = model.model.layers[1].register_forward_hook(shifted)
    with pytest.raises(UnsupportedModelError):
        generate(wrapper, PROMPT, max_new_tokens=2)
    handle.remove()
    assert len(generate(wrapper, PROMPT, max_new_tokens=2).tokens) == 2


@pytest.mark.parametrize("name", ["self_attn", "mlp", "input_layernorm", "self_attn.q_proj"])
def test_hooks_of_modules_that_are_called_run(name):
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    model.model.layers[1].get_submodule(name).register_forward_hook(shifted)
    drafter = LayerSkipDrafter(wrapper, DraftConfig(SkipSet(LAYERS, (2,)), stopping=FixedLength(3)), DraftWeights())
    ours = generate(wrapper, PROMPT, drafter=drafter, max_new_tokens=12, eos_token_ids=())
    near_tie_or_same(model, PROMPT, ours.tokens, transformers_greedy(model, PROMPT, 12))


def test_a_compiled_forward_computes_the_same_and_is_let_through():
    model = tiny_llama()
    model.forward = torch.compile(model.forward, backend="eager")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert len(generate(LayerSkipModel(model), PROMPT, max_new_tokens=2).tokens) == 2


def test_the_same_forward_bound_again_is_no_other():
    model = tiny_llama()
    model.forward = MethodType(type(model).forward, model)
    assert len(generate(LayerSkipModel(model), PROMPT, max_new_tokens=2).tokens) == 2


CHANGES = {
    "settings": lambda m: setattr(m.config, "sliding_window", 2),
    "the attention": lambda m: m.set_attn_implementation("eager"),
    "the head": lambda m: m.set_output_embeddings(copy.deepcopy(m.get_output_embeddings())),
    "the embedding": lambda m: m.set_input_embeddings(copy.deepcopy(m.get_input_embeddings())),
    "a layer": lambda m: m.model.layers.__setitem__(1, copy.deepcopy(m.model.layers[1])),
    "a norm": lambda m: setattr(m.model, "norm", copy.deepcopy(m.model.norm)),
    "an MLP": lambda m: setattr(m.model.layers[0], "mlp", copy.deepcopy(m.model.layers[0].mlp)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_wrapper_of_a_model_that_was_changed_says_so(change):
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    change(model)
    with pytest.raises(InvalidInputError, match="were changed after it was wrapped; wrap it anew"):
        generate(wrapper, PROMPT, max_new_tokens=2)
    assert generate(LayerSkipModel(model), PROMPT, max_new_tokens=2).tokens


def test_generate_of_a_model_whose_settings_were_changed_gives_its_text():
    """As transformers does: a mistral's window can be changed at any time."""
    from tests.models import tiny_model

    model = tiny_model("mistral")
    prompt = list(range(1, 21))
    profile = profile_for(LayerSkipModel(model))
    model.generate(torch.tensor([prompt]), custom_generate=speculate(profile), max_new_tokens=4)
    model.config.sliding_window = 2
    profile = profile_for(LayerSkipModel(model))
    greedy = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
    ours = model.generate(torch.tensor([prompt]), custom_generate=speculate(profile), **greedy)
    near_tie_or_same(model, prompt, ours[0, len(prompt) :].tolist(), transformers_greedy(model, prompt, 12))


def negate_head(model):
    with torch.no_grad():
        model.lm_head.weight.neg_()


@pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")
@pytest.mark.parametrize("change", [negate_head, lambda m: m.model.layers[0].mlp.register_forward_hook(shifted)])
def test_packed_weights_of_a_model_that_was_changed_are_refused(change):
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    engine = PackedEngine(wrapper)
    generate(wrapper, PROMPT, engine=engine, max_new_tokens=2)
    change(model)
    with pytest.raises(InvalidInputError, match=r"engine 'packed': the model's .* were changed after it was made"):
        generate(wrapper, PROMPT, engine=engine, max_new_tokens=2)


def test_captured_passes_of_a_model_that_was_changed_are_captured_anew():
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    engine = GraphEngine(wrapper, call_directly)
    generate(wrapper, PROMPT, engine=engine, max_new_tokens=3)
    assert engine._verifications
    negate_head(model)
    engine.check_current()
    assert not engine._verifications
    ours = generate(wrapper, PROMPT, engine=engine, max_new_tokens=8, eos_token_ids=()).tokens
    near_tie_or_same(model, PROMPT, ours, transformers_greedy(model, PROMPT, 8))


def test_keys_and_values_are_not_kept_across_a_change_of_weights():
    model = tiny_llama()
    wrapper, kept = LayerSkipModel(model), PrefixCache()
    first = generate(wrapper, PROMPT, prompt_cache=kept, max_new_tokens=4, eos_token_ids=())
    longer = [*PROMPT, *first.tokens, 7]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_()
    after = generate(wrapper, longer, prompt_cache=kept, max_new_tokens=8, eos_token_ids=())
    assert after.stats.reused == 0
    near_tie_or_same(model, longer, after.tokens, transformers_greedy(model, longer, 8))
    again = generate(wrapper, [*longer, *after.tokens, 3], prompt_cache=kept, max_new_tokens=2, eos_token_ids=())
    assert again.stats.reused > 0


def test_keys_and_values_are_not_kept_across_a_change_of_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(tiny_llama(), config, adapter_name="a")
    model.add_adapter("b", config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3, generator=generator)
    model.eval()
    wrapper, kept = LayerSkipModel(model), PrefixCache()
    first = generate(wrapper, PROMPT, prompt_cache=kept, max_new_tokens=4, eos_token_ids=())
    longer = [*PROMPT, *first.tokens, 7]
    model.set_adapter("b")
    for reused in (0, len(longer) + 3):
        after = generate(wrapper, longer, prompt_cache=kept, max_new_tokens=4, eos_token_ids=())
        assert after.stats.reused == min(reused, len(longer) - 1)
        near_tie_or_same(model, longer, after.tokens, transformers_greedy(model, longer, 4))
    with model.disable_adapter():
        plain = generate(wrapper, longer, prompt_cache=kept, max_new_tokens=4, eos_token_ids=())
        assert plain.stats.reused == 0
        near_tie_or_same(model, longer, plain.tokens, transformers_greedy(model, longer, 4))


@pytest.mark.parametrize("to_disk", [False, True])
def test_an_offloaded_model_is_refused_in_one_line(to_disk, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama()
    profile = profile_for(LayerSkipModel(model))
    if to_disk:
        accelerate.disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match="is offloaded"):
        model.generate(torch.tensor([PROMPT]), custom_generate=speculate(profile), max_new_tokens=2)


def test_hooks_that_transformers_leaves_behind_do_nothing():
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    engine = PackedEngine(wrapper) if packing_available() else None
    with torch.inference_mode():
        model(torch.tensor([PROMPT]), output_hidden_states=True, output_attentions=True)
    assert len(generate(wrapper, PROMPT, engine=engine, max_new_tokens=2, eos_token_ids=()).tokens) == 2
    assert len(generate(LayerSkipModel(model), PROMPT, max_new_tokens=2, eos_token_ids=()).tokens) == 2


def test_a_hook_that_follows_another_is_another():
    """Whatever memory it lies in."""
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    states = []
    for shift in range(20):
        handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out, shift=shift: out + shift)
        states.append(wrapper.read_state())
        handle.remove()
    assert all(one != other for one, other in pairwise(states))


def test_a_model_that_was_moved_away_and_back_is_another():
    model = tiny_llama()
    wrapper = LayerSkipModel(model)
    before = wrapper.read_state()
    model.bfloat16().float()
    assert wrapper.read_state() != before


def test_adapters_that_are_added_later_are_known():
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    wrapper, kept = LayerSkipModel(model), PrefixCache()
    first = generate(wrapper, PROMPT, prompt_cache=kept, max_new_tokens=4, eos_token_ids=())
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3, generator=generator)
    longer = [*PROMPT, *first.tokens, 7]
    for context in (nullcontext(), adapted.disable_adapter(), nullcontext()):
        with context:
            ours = generate(wrapper, longer, prompt_cache=kept, max_new_tokens=6, eos_token_ids=())
            assert ours.stats.reused == 0
            near_tie_or_same(model, longer, ours.tokens, transformers_greedy(model, longer, 6))


@pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")
def test_adapters_can_be_switched_beside_packed_weights():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    wrapper = LayerSkipModel(model)
    engine = PackedEngine(wrapper)
    for context in (nullcontext(), model.disable_adapter(), nullcontext()):
        with context:
            ours = generate(wrapper, PROMPT, engine=engine, max_new_tokens=8, eos_token_ids=()).tokens
            near_tie_or_same(model, PROMPT, ours, transformers_greedy(model, PROMPT, 8))
