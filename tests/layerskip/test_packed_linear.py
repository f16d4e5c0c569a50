"""Packed linear layers compute what the plain ones do, and the plain weights can be had back."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerskip import LayerSkipModel
from layerskip.fingerprint import fingerprint
from layerskip.packed_linear import (
    PackedLinear,
    PackedWeights,
    can_be_packed,
    has_kernels_for,
    pack_children,
    packed_alone,
    packing_available,
    unpack,
)
from tests.models import tiny_llama

pytestmark = pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")

TOLERANCE = {
    dtype: tolerance
    for dtype, tolerance in {torch.float32: 1e-5, torch.bfloat16: 2e-2}.items()
    if has_kernels_for(dtype)
}


class Gated(nn.Module):
    """Layers that take one input, and one that takes another; like a decoder's attention and MLP at once."""

    def __init__(self, size, bias):
        super().__init__()
        for name, out in {"q_proj": size, "k_proj": 3, "v_proj": 5, "gate_proj": 7, "up_proj": 7}.items():
            setattr(self, name, nn.Linear(size, out, bias=bias))
        self.down_proj = nn.Linear(7, size, bias=not bias)

    def forward(self, x):
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        return torch.cat([*parts, self.down_proj(self.gate_proj(x) * self.up_proj(x))], dim=-1)


@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.sampled_from(list(TOLERANCE)))
@settings(max_examples=30)
@torch.inference_mode()
def test_packed_layers_give_the_outputs_of_the_plain_ones(size, rows, bias, dtype):
    plain = Gated(size, bias).to(dtype).eval()
    packed = copy.deepcopy(plain)
    pack_children(packed)
    assert all(type(child) is PackedLinear for child in packed.children())
    x = torch.randn(1, rows, size, dtype=dtype)
    expected = plain(x)
    largest = float(expected.abs().max())
    for _ in range(2):
        torch.testing.assert_close(packed(x), expected, rtol=0, atol=TOLERANCE[dtype] * max(largest, 1))


@torch.inference_mode()
def test_layers_of_one_group_can_be_called_in_any_order_and_with_any_input():
    plain = Gated(8, True).eval()
    packed = copy.deepcopy(plain)
    pack_children(packed)
    inputs = [torch.randn(1, 2, 8) for _ in range(3)]
    for name, x in zip(
        ["v_proj", "q_proj", "q_proj", "k_proj", "v_proj", "k_proj"], inputs + inputs[::-1], strict=True
    ):
        torch.testing.assert_close(getattr(packed, name)(x), getattr(plain, name)(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_an_input_that_was_changed_in_place_is_computed_anew():
    plain = Gated(8, True).eval()
    packed = copy.deepcopy(plain)
    pack_children(packed)
    x = torch.randn(1, 2, 8)
    packed(x)
    x.mul_(2)
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights_copies_and_state_dicts_are_those_of_the_plain_layers(dtype):
    plain = Gated(8, True).to(dtype).eval()
    packed = copy.deepcopy(plain)
    pack_children(packed)
    assert list(packed.state_dict()) != []
    for name, weight in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight)
    for name, layer in plain.named_children():
        assert torch.equal(getattr(packed, name).weight, layer.weight)
    copied = copy.deepcopy(packed)
    unpack(packed)
    for restored in (copied, packed):
        assert all(type(child) is nn.Linear for child in restored.children())
        assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), plain.parameters(), strict=True))


def test_gradients_pass_through_a_packed_layer():
    linear = nn.Linear(4, 3).eval()
    packed = packed_alone(linear)
    x = torch.randn(2, 4, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(2, 4).detach())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_packed_layer_shows_its_size_device_and_type_without_holding_a_plain_weight(dtype):
    packed = packed_alone(nn.Linear(64, 32, dtype=dtype))
    [outline] = [tensor for tensor in packed.buffers() if tensor.dim() == 2]
    assert (outline.shape, outline.dtype, outline.device.type) == ((32, 64), dtype, "cpu")
    assert outline.untyped_storage().nbytes() == dtype.itemsize


def test_a_model_with_packed_layers_has_the_fingerprint_of_the_plain_one():
    model = LayerSkipModel(tiny_llama())
    expected = fingerprint(model)
    for sublayer in model.sublayers:
        pack_children(sublayer.module)
    assert fingerprint(model) == expected
    unpack(model.hf_model)
    assert fingerprint(model) == expected


def with_a_hook(linear):
    linear.register_forward_hook(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(2, 2, dtype=torch.float16),
        lambda: nn.Linear(2, 2, device="meta"),
        lambda: nn.LayerNorm(2),
        lambda: with_a_hook(nn.Linear(2, 2)),
        lambda: packed_alone(nn.Linear(2, 2)),
    ],
)
def test_what_is_not_a_plain_linear_layer_on_the_cpu_is_left_as_it_is(layer):
    assert not can_be_packed(layer())


@pytest.mark.parametrize("bias", [False, True])
def test_a_single_row_may_run_on_the_plain_weights_and_several_on_packed_ones(bias):
    layers = [nn.Linear(16, size, bias=bias) for size in (24, 8)]
    weights = PackedWeights(layers, plain_one_row=True)
    x, residual = torch.randn(1, 3, 16), torch.randn(1, 3, 32)
    with torch.inference_mode():
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        for rows in (slice(0, 1), slice(0, 3)):
            assert torch.allclose(weights(x[:, rows]), expected[:, rows], atol=1e-5)
            assert torch.allclose(
                weights.plus(x[:, rows], residual[:, rows]), (residual + expected)[:, rows], atol=1e-5
            )
        for layer in layers:
            layer.weight.zero_()
        nothing = torch.cat([layer(x) for layer in layers], dim=-1)
        assert torch.equal(weights(x[:, :1]), nothing[:, :1])
        assert torch.allclose(weights(x), expected, atol=1e-5)
