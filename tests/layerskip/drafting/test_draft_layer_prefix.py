"""A layer before draft heads: what it is at first, how it is kept, and what is wrong with one that does not fit."""

from datetime import UTC, datetime

import pytest
import torch
from safetensors.torch import load

from layerskip import DraftConfig, DraftProfile, FixedLength, LayerSkipModel, SkipSet, export_draft, generate
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.head_drafter import HeadDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from layerskip.fingerprint import identify
from layerskip.hub import card_of
from layerskip.profile import Provenance
from layerskip.training.trainable_draft import _NoCache
from search.compare import transformers_methods
from search.measure import draft_bytes
from tests.models import (
    LAYERS,
    head_config,
    random_heads,
    random_layers,
    random_prefix,
    tiny_llama,
    transformers_greedy,
)

TOP = 2 * LAYERS


def assets_of(model, **others):
    parts = {"layers": [random_prefix(model)], "heads": random_heads(model, "hydra")} | others
    return DraftWeights(**parts)


def profile_for(model, weights=None):
    return DraftProfile.of(
        head_config(model, FixedLength(3), tree=(2, 2)),
        weights,
        model=identify(model, "my-model"),
        provenance=Provenance(created=datetime(2026, 1, 2, tzinfo=UTC), tool="a test"),
    )


def test_at_first_it_leaves_hidden_states_as_they_are_and_can_learn_not_to(each_family):
    """In every family: behind a norm of one's own as well as without."""
    layer = DraftLayer.identity(each_family).requires_grad_()
    assert (layer.start, layer.stop, layer.like) == (TOP, TOP, LAYERS - 1)
    states = torch.randn(1, 7, each_family.config.hidden_size, generator=torch.Generator().manual_seed(0))
    out = layer(states, each_family.pass_context(7, _NoCache()))
    assert torch.equal(out, states)
    out.square().sum().backward()
    for sublayer in (layer.attention, layer.mlp):
        last = [*sublayer.after.parameters(), *list(_parts(sublayer).parameters())]
        assert any(weight.grad is not None and weight.grad.any() for weight in last)


def _parts(sublayer):
    return sublayer.attention if hasattr(sublayer, "attention") else sublayer.mlp


def test_the_models_own_layer_stays(each_family):
    before = {name: weight.clone() for name, weight in each_family.hf_model.state_dict().items()}
    DraftLayer.identity(each_family)
    assert all(torch.equal(weight, before[name]) for name, weight in each_family.hf_model.state_dict().items())


def test_a_model_whose_weights_are_quantized_gives_none(llama):
    model = LayerSkipModel(tiny_llama())
    model.hf_model.model.layers[LAYERS - 1].mlp.up_proj = torch.nn.Identity()  # as quantizers replace it
    with pytest.raises(InvalidInputError, match=r"^layer 3: its weights are quantized or adapted; tune the model"):
        DraftLayer.identity(model)


# Keeping it.


def test_a_profile_brings_the_layer_along_and_drafts_with_it(llama, tmp_path):
    in_half = assets_of(llama, token_ids=torch.arange(3, 40)).to(torch.bfloat16)
    profile = profile_for(llama, in_half)
    profile.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    assert (loaded.tensors.heads, loaded.tensors.layers, loaded.tensors.bridges) == (3, 1, 0)
    assert loaded.draft == "3 tokens; tree 2-2; 3 draft heads after a draft layer; draft vocabulary of 37"
    [layer], [expected] = loaded.weights(llama).layers, in_half.layers
    assert (layer.start, layer.stop, layer.like) == (TOP, TOP, LAYERS - 1)
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in layer.state_dict().items())
    names = load((tmp_path / loaded.tensors.file).read_bytes())
    assert "layer.8.8.3.self_attn.o_proj.weight" in names
    drafter = loaded.drafter(llama)
    assert isinstance(drafter, HeadDrafter)
    ours = generate(llama, [1, 2, 3], drafter=drafter, max_new_tokens=20, eos_token_ids=[])
    at_once = HeadDrafter(llama, head_config(llama, FixedLength(3), tree=(2, 2)), in_half)
    expected = generate(llama, [1, 2, 3], drafter=at_once, max_new_tokens=20, eos_token_ids=[])
    assert ours.tokens == transformers_greedy(llama.hf_model, [1, 2, 3], 20)
    assert (ours.tokens, ours.stats.accepted) == (expected.tokens, expected.stats.accepted)


def test_its_memory_counts(llama):
    with_layer, without = (
        draft_bytes(llama, DraftConfig(SkipSet(LAYERS)), assets_of(llama, **own)) for own in ({}, {"layers": []})
    )
    weights = sum(weight.numel() for weight in random_prefix(llama).parameters())
    assert with_layer - without >= 4 * weights


def test_the_card_says_so(llama):
    card = card_of(profile_for(llama, assets_of(llama)), "me/heads")
    assert "small heads on its hidden states propose" in card
    assert "3 draft heads after a draft layer" in card


# What does not fit.


def test_heads_and_their_layer_are_no_model_of_their_own(byte_tokenizer, tmp_path):
    model = LayerSkipModel(tiny_llama())
    profile = profile_for(model, assets_of(model))
    with pytest.raises(InvalidInputError, match=r"^as_assistant: the profile drafts with heads"):
        profile.as_assistant(model.hf_model)
    with pytest.raises(InvalidInputError, match=r"^the profile drafts with heads"):
        export_draft(model, byte_tokenizer, profile, tmp_path / "draft")
    _, left_out = transformers_methods(model, {"mine": profile})
    assert left_out["transformers assistant (mine)"].startswith("as_assistant: the profile drafts with heads")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: assets_of(model, heads=None),
            "draft layer: the one at sublayer 8 replaces no sublayer; only draft heads have such a layer, and there "
            "are none",
        ),
        (
            lambda model: assets_of(model, layers=[random_prefix(model), *random_layers(model, {2: 8})]),
            "draft heads: a draft with heads cannot also have bridges or draft layers",
        ),
        (
            lambda model: assets_of(model, layers=random_layers(model, {6: 6, TOP: TOP})),
            "draft heads: expected one layer before them at most, found 2",
        ),
        (
            lambda model: HeadDrafter(
                model,
                head_config(model, FixedLength(2)),
                assets_of(model, layers=random_layers(model, {TOP + 4: TOP + 4})),
            ),
            "draft heads: the layer before them runs after 12 sublayers, but the model has 8; train heads for this "
            "model with 'layerskip tune'",
        ),
        (
            lambda model: DraftLayer(model, TOP, TOP, LAYERS, {}),
            "draft layer: is built like layer 4, but the model has 4 layers",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(llama, make, message):
    with pytest.raises(InvalidInputError) as error:
        make(llama)
    assert str(error.value) == message


def test_a_layer_of_another_shape_is_refused(llama):
    weights = random_prefix(llama).layer.state_dict() | {"mlp.up_proj.weight": torch.zeros(7, 32)}
    with pytest.raises(InvalidInputError) as error:
        DraftLayer(llama, TOP, TOP, LAYERS - 1, weights)
    assert str(error.value).startswith("draft layer: the weights do not fit this model: size mismatch for mlp.")
    assert "\n" not in str(error.value)


def test_a_file_with_a_layer_and_nobody_to_read_it_is_refused(llama):
    tensors = assets_of(llama).tensors()
    only_layer = {name: tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    with pytest.raises(InvalidInputError, match=r"^draft layer: the one at sublayer 8 replaces no sublayer"):
        DraftWeights.from_tensors(only_layer, llama)
