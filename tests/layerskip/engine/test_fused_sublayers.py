"""Sublayers in fewer operators add to the hidden states what the model's own modules add, up to rounding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerskip import LayerSkipModel
from layerskip.engine.fused_sublayers import (
    FusedAttention,
    Fusing,
    OneKernelRMSNorm,
    Probe,
    RMSNorm,
    RotaryTable,
    all_equal_to_rounding,
    equal_to_rounding,
    fused_candidate,
    fused_norm,
)
from layerskip.packed_linear import pack_children, packing_available
from tests.models import EVERY_FAMILY, tiny_llama, tiny_model

needs_packing = pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")


def norms_of(model):
    """The norms around the sublayers, and the last one."""
    around = [norm for sublayer in model.sublayers for norm in (sublayer.before, sublayer.after)]
    return [norm for norm in [*around, model.final_norm] if type(norm).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "qwen3"])
def test_every_family_s_norms_are_fused(family, dtype):
    for norm in norms_of(LayerSkipModel(tiny_model(family).to(dtype))):
        fused = fused_norm(norm)
        assert type(fused) is RMSNorm
        states = 5 * torch.randn(1, 3, 32).to(dtype)
        with torch.inference_mode():
            assert equal_to_rounding(fused(states), norm(states))
            assert fused(states).dtype == dtype


class MeanNorm(nn.Module):
    """Has what a root-mean-square norm has, and computes something else."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.Identity(), MeanNorm()])
def test_another_norm_stays_as_it_is(norm):
    assert fused_norm(norm) is norm


@given(st.floats(1e-3, 1e3), st.floats(-1, 1))
@settings(max_examples=25)
def test_what_differs_by_more_than_rounding_is_told_apart(scale, part):
    values = torch.linspace(-1, 1, 9) * scale
    assert equal_to_rounding(values, values.clone())
    assert equal_to_rounding(values * (1 + 1e-6), values)
    other = values.clone()
    other[3] += part * scale
    assert equal_to_rounding(other, values) == (abs(part) <= 1e-4) or abs(abs(part) - 1e-4) < 1e-6
    assert not equal_to_rounding(values[:5], values)
    assert not equal_to_rounding(values * float("nan"), values)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "llama-eager", "mistral-eager"])
def test_sublayers_in_fewer_operators_add_the_same(family, dtype):
    model = LayerSkipModel(EVERY_FAMILY[family]().to(dtype))
    probe, table = Probe(model), RotaryTable()
    for sublayer in model.sublayers:
        expected = probe(sublayer)
        packed = copy.copy(sublayer)
        packed.module = copy.deepcopy(sublayer.module)
        pack_children(packed.module)
        fused = fused_candidate(packed, table)
        assert fused is not None
        assert fused.num_weights == sublayer.num_weights
        assert all_equal_to_rounding(probe(fused), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "gemma2", "llama-eager", "mistral-eager"])
def test_sublayers_over_plain_weights_add_the_same(family, dtype):
    model = LayerSkipModel(EVERY_FAMILY[family]().to(dtype))
    probe, table = Probe(model), RotaryTable()
    for sublayer in model.sublayers:
        fused = fused_candidate(sublayer, table)
        assert fused is not None
        assert all_equal_to_rounding(probe(fused), probe(sublayer))


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma3_text"])
def test_attention_with_weights_of_unknown_use_stays_as_it_is(family):
    model = LayerSkipModel(EVERY_FAMILY[family]())
    kinds = {type(fused_candidate(sublayer, RotaryTable())).__name__ for sublayer in model.sublayers}
    assert kinds == {"NoneType", "FusedMLP"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_without_rotary_embedding_are_told_apart_however_even_their_attention_is(dtype):
    hf_model = EVERY_FAMILY["smollm3"]().to(dtype)
    for layer in hf_model.model.layers:
        with torch.no_grad():
            layer.self_attn.q_proj.weight.mul_(1e-3)
    model = LayerSkipModel(hf_model)
    fusing = Fusing(model)
    for layer, rotated in enumerate(model.config.no_rope_layers):
        sublayer = model.sublayers[2 * layer]
        fused = fusing.fused(sublayer, fusing.probe(sublayer), dtype)
        assert (type(fused) is FusedAttention) == bool(rotated)


def test_a_sublayer_with_a_hook_inside_stays_as_it_is():
    model = LayerSkipModel(tiny_llama())
    seen = []
    model.sublayers[0].attention.register_forward_hook(lambda *_: seen.append(1))
    model.sublayers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    assert fused_candidate(model.sublayers[0], RotaryTable()) is None
    assert fused_candidate(model.sublayers[1], RotaryTable()) is None
    norm = model.sublayers[2].before
    norm.register_forward_hook(lambda *_: seen.append(1))
    assert fused_norm(norm) is norm


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_norm_of_one_kernel_is_the_same(family):
    for norm in norms_of(LayerSkipModel(tiny_model(family))):
        added = 1 if family == "gemma2" else 0
        own = OneKernelRMSNorm(norm.weight.detach() + added, getattr(norm, "variance_epsilon", getattr(norm, "eps", 0)))
        states = torch.randn(2, 3, 32)
        assert equal_to_rounding(own(states), norm(states))


def test_grouped_queries_see_what_repeated_keys_would_show_them():
    model = LayerSkipModel(tiny_llama(num_attention_heads=8, num_key_value_heads=2, hidden_size=32))
    fused = fused_candidate(model.sublayers[0], RotaryTable())
    for n in (1, 4):
        queries, (keys, values) = torch.randn(1, 8, n, 4), torch.randn(2, 1, 2, 9, 4)
        mask = torch.where(torch.rand(1, 1, n, 9) < 0.5, 0.0, torch.finfo(torch.float32).min)
        expected = nn.functional.scaled_dot_product_attention(
            queries, keys.repeat_interleave(4, 1), values.repeat_interleave(4, 1), mask, scale=fused._scaling
        )
        repeated = mask if n == 1 else mask.repeat(1, 1, 4, 1)
        torch.testing.assert_close(fused._seen(queries, keys, values, repeated), expected.transpose(1, 2).flatten(2))


@needs_packing
def test_a_sublayer_that_lacks_the_parts_has_no_such_form():
    phi = LayerSkipModel(tiny_model("phi3"))
    for sublayer in phi.sublayers:
        pack_children(sublayer.module)
        assert fused_candidate(sublayer, RotaryTable()) is None  # its layers are joint already, by other names
