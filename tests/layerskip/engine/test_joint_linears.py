"""Linear layers with one input run as one, and their weights stay the parameters that they were."""

import copy

import pytest
import torch
from torch import nn

from layerskip import LayerSkipModel
from layerskip.engine.joint_linears import PlainJoint, join_weights, joint_of
from tests.models import tiny_llama, tiny_model


@pytest.fixture
def attention():
    return tiny_model("qwen2").model.layers[0].self_attn  # with biases


def test_joined_weights_are_one_product_with_the_same_values(attention):
    x = torch.randn(1, 3, attention.q_proj.in_features)
    names = "q_proj", "k_proj", "v_proj"
    expected = torch.cat([getattr(attention, name)(x) for name in names], dim=-1)
    before = {name: getattr(attention, name).weight.detach().clone() for name in names}
    assert torch.equal(PlainJoint([getattr(attention, name) for name in names])(x), expected)
    join_weights(attention)
    joint = joint_of(attention, *names)
    assert len(joint._products) == 1
    torch.testing.assert_close(joint(x), expected)
    for name in names:
        assert torch.equal(getattr(attention, name).weight, before[name])
        assert isinstance(getattr(attention, name).weight, nn.Parameter)


def test_joining_takes_no_memory_and_joins_once(attention):
    join_weights(attention)
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    whole = weights[0].untyped_storage()
    assert whole.nbytes() == sum(weight.nbytes for weight in weights)
    join_weights(attention)
    assert attention.v_proj.weight.untyped_storage().data_ptr() == whole.data_ptr()


def test_a_change_of_one_weight_is_one_of_the_joint(attention):
    join_weights(attention)
    joint = joint_of(attention, "q_proj", "k_proj", "v_proj")
    x = torch.randn(1, 1, attention.q_proj.in_features)
    with torch.no_grad():
        attention.k_proj.weight.zero_()
        attention.k_proj.bias.zero_()
    queries = attention.q_proj.out_features
    keys = joint_of(attention, "q_proj", "k_proj", "v_proj")(x)[..., queries : queries + attention.k_proj.out_features]
    assert not keys.any()
    assert joint(x).shape == (1, 1, sum(joint.sizes))


def test_a_model_whose_weights_are_joined_is_saved_and_loaded_as_before(tmp_path):
    model = tiny_llama()
    original = copy.deepcopy(model.state_dict())
    for sublayer in LayerSkipModel(model).sublayers:
        join_weights(sublayer.module)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in original.items())


def test_a_layer_with_a_hook_is_no_part_of_a_joint(attention):
    attention.k_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(AttributeError, match="neither plain, packed nor quantized"):
        joint_of(attention, "q_proj", "k_proj", "v_proj")


def test_layers_of_different_input_stay_apart():
    mlp = nn.Module()
    mlp.gate_proj, mlp.up_proj = nn.Linear(4, 6), nn.Linear(5, 6)
    before = mlp.up_proj.weight.data_ptr()
    join_weights(mlp)
    assert mlp.up_proj.weight.data_ptr() == before
