"""Draft heads: what they compute, how they are kept, and what is wrong with those that do not fit."""

import itertools
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip import DraftConfig, DraftProfile, FixedLength, LayerSkipModel, SkipSet, export_draft, generate
from layerskip.drafting.head_drafter import HeadDrafter
from layerskip.drafting.heads import HEAD_KINDS, HydraHeads, MedusaHeads, untrained_heads
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError, InvalidProfileError
from layerskip.fingerprint import identify
from layerskip.hub import card_of
from layerskip.profile import Provenance
from tests.models import LAYERS, head_config, random_heads, random_layers, tiny_llama

SIZE = 32

kinds = pytest.mark.parametrize("kind", HEAD_KINDS)


def embedded(model, *tokens):
    return model.embed(torch.tensor(tokens))[0]


@kinds
def test_untrained_heads_say_what_the_full_model_said(each_family, kind):
    """The final norm comes behind them, as the target model has it."""
    heads = untrained_heads(kind, 3, each_family.config.hidden_size)
    with torch.inference_mode():
        states = each_family.forward(torch.tensor([3, 1, 4, 1, 5]), each_family.new_cache(5))[0]
        expected = each_family.logits(states[None])
        for place in range(3):
            known = torch.stack([embedded(each_family, *range(place + 1))] * len(states))
            found = each_family.logits(heads.at(place, states, known)[None])
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@kinds
@given(place=st.integers(0, 3), scale=st.floats(0.01, 100))
def test_what_heads_say_does_not_depend_on_the_size_of_the_state(llama, kind, place, scale):
    heads, known = random_heads(llama, kind, 4), embedded(llama, *range(1, place + 2))[None]
    states = torch.linspace(-1, 1, SIZE)[None]
    torch.testing.assert_close(
        heads.at(place, scale * states, scale * known), heads.at(place, states, known), atol=1e-3, rtol=1e-3
    )


def test_medusa_foretells_all_places_at_once(llama):
    heads, state = random_heads(llama, "medusa", 4), torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    nothing = torch.empty(1, 1, SIZE)
    for place, said in enumerate(heads.all_at(state)):
        torch.testing.assert_close(said, heads.at(place, state[None], nothing)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "sees"), [("medusa", False), ("hydra", True)])
def test_hydra_sees_every_token_before_its_place_and_medusa_none(llama, kind, sees):
    heads, states = random_heads(llama, kind, 3), torch.ones(1, SIZE)
    texts = [embedded(llama, *text)[None] for text in itertools.product((2, 9), repeat=3)]
    said = [heads.at(2, states, text) for text in texts]
    assert all(torch.allclose(one, other) != sees for one, other in itertools.combinations(said, 2))


def filled(module, **weights):
    module.load_state_dict(weights)
    return module


def test_a_medusa_head_is_a_residual_block_with_silu():
    weight, bias = torch.randn(1, 4, 4), torch.randn(1, 4)
    x = torch.tensor([[3.0, -1.0, 1.0, 1.0]])
    unit = x / 3**0.5
    z = unit @ weight[0].T + bias[0]
    torch.testing.assert_close(
        filled(MedusaHeads(1, 4), weight=weight, bias=bias).at(0, x, x[None]), unit + z / (1 + (-z).exp())
    )


def test_a_hydra_head_is_a_perceptron_on_state_and_tokens_with_a_residual():
    up, bias, down = torch.randn(4, 12), torch.randn(4), torch.randn(4, 4)
    x, tokens = torch.tensor([[3.0, -1.0, 1.0, 1.0]]), torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0]])
    unit = x / 3**0.5
    z = torch.cat([unit[0], *tokens]) @ up.T + bias
    heads = HydraHeads(2, 4)
    filled(heads.head(1), up=up, bias=bias, down=down)
    found = heads.at(1, x, tokens[None])
    torch.testing.assert_close(found[0], unit[0] + (z / (1 + (-z).exp())) @ down.T)


# Keeping them.


@kinds
def test_heads_come_back_from_a_file_as_they_were(llama, kind):
    heads = random_heads(llama, kind)
    back = DraftWeights.from_tensors(DraftWeights(token_ids=torch.arange(9), heads=heads).tensors(), llama)
    assert back.token_ids.tolist() == list(range(9))
    assert type(back.heads) is type(heads)
    assert (back.heads.count, back.heads.hidden_size) == (3, SIZE)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(back.heads.state_dict()[name], tensor)


def test_weights_without_heads_have_none(llama):
    assert DraftWeights.from_tensors(DraftWeights(token_ids=torch.arange(3)).tensors(), llama).heads is None


@kinds
def test_heads_ask_for_no_gradient(llama, kind):
    heads = random_heads(llama, kind)
    for weights in (DraftWeights(heads=heads), DraftWeights.from_tensors(DraftWeights(heads=heads).tensors(), llama)):
        assert not any(weight.requires_grad for weight in weights.parameters())


@kinds
def test_a_profile_brings_its_heads_along_and_drafts_with_them(llama, tmp_path, kind):
    in_half = random_heads(llama, kind, 3).to(torch.bfloat16)
    assets = DraftWeights(token_ids=torch.arange(3, 40), heads=in_half)
    profile = profile_for(llama, assets)
    profile.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    assert (loaded.tensors.heads, loaded.tensors.layers, loaded.tensors.bridges) == (3, 0, 0)
    assert loaded.draft == "3 tokens; tree 2-2; 3 draft heads; draft vocabulary of 37"
    drafter = loaded.drafter(llama)
    assert isinstance(drafter, HeadDrafter)
    ours = generate(llama, [1, 2, 3], drafter=drafter, max_new_tokens=20, eos_token_ids=[])
    at_once = HeadDrafter(llama, head_config(llama, FixedLength(3), tree=(2, 2)), assets)
    expected = generate(llama, [1, 2, 3], drafter=at_once, max_new_tokens=20, eos_token_ids=[])
    assert (ours.tokens, ours.stats.accepted) == (expected.tokens, expected.stats.accepted)


def profile_for(model, weights=None, skip_set=None):
    return DraftProfile.of(
        DraftConfig(skip_set or SkipSet(LAYERS), stopping=FixedLength(3), tree=(2, 2)),
        weights,
        model=identify(model, "my-model"),
        provenance=Provenance(created=datetime(2026, 1, 2, tzinfo=UTC), tool="a test"),
    )


# What does not fit.


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"medusa.weight": (2, 32, 32)}, 'Missing key(s) in state_dict: "bias"'),
        ({"medusa.weight": (2, 32, 31), "medusa.bias": (2, 32)}, "size mismatch for weight"),
        ({"medusa.weight": (32, 32), "medusa.bias": (32,)}, "size mismatch for weight"),
        ({"medusa.weight": (2, 32, 32), "medusa.bias": (3, 32)}, "size mismatch for weight"),
        ({"medusa.weight": (2, 4, 4), "medusa.bias": (2, 4)}, "size mismatch for weight"),
        (
            {"medusa.weight": (1, 32, 32), "medusa.bias": (1, 32), "medusa.more": (1,)},
            'Unexpected key(s) in state_dict: "more"',
        ),
        (
            {"hydra.1.up": (32, 32), "hydra.1.bias": (32,), "hydra.1.down": (32, 32)},
            "size mismatch for 1.up",
        ),
        ({"hydra.1.up": (5, 64), "hydra.1.bias": (5,), "hydra.1.down": (32, 5)}, "size mismatch for 1.up"),
        ({"hydra.2.up": (32, 64), "hydra.2.bias": (32,), "hydra.2.down": (32, 32)}, '"1.up"'),
    ],
)
def test_a_file_with_wrong_heads_says_which_tensor(llama, tensors, message):
    with pytest.raises(InvalidInputError, match=r"^draft heads: the weights do not fit this model: ") as error:
        DraftWeights.from_tensors({name: torch.zeros(shape) for name, shape in tensors.items()}, llama)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"hydra.1.up": (32, 64), "hydra.1.bias": (32,), "hydra.1.down": (32, 32)},
            "draft heads: there are medusa and hydra heads; expected one kind",
        ),
        (
            {"bridge.2.4.bias": (32,), "bridge.2.4.factor.0": (32, 32)},
            "draft heads: a draft with heads cannot also have bridges or draft layers",
        ),
        ({"bridge.2.4.factor.0": (32, 32)}, "bridge.2.4: expected bias and factor.0, found factor.0"),
        ({"spare.weight": (1,)}, "not the tensors of a draft: spare.weight"),
    ],
)
def test_a_file_with_heads_and_what_does_not_go_with_them_is_refused(llama, more, message):
    shapes = {"medusa.weight": (1, 32, 32), "medusa.bias": (1, 32)} | more
    with pytest.raises(InvalidInputError) as error:
        DraftWeights.from_tensors({name: torch.zeros(shape) for name, shape in shapes.items()}, llama)
    assert str(error.value) == message


@kinds
def test_heads_for_another_size_of_hidden_states_are_refused(llama, kind):
    with pytest.raises(InvalidInputError) as error:
        HeadDrafter(llama, head_config(llama, FixedLength(2)), DraftWeights(heads=untrained_heads(kind, 2, 48)))
    assert str(error.value) == (
        "draft heads: are for hidden states of 48 numbers, but this model's have 32; "
        "train heads for this model with 'layerskip tune'"
    )


def test_assets_without_heads_give_no_drafter_with_heads(llama):
    with pytest.raises(InvalidInputError, match=r"^draft heads: the draft's weights have none$"):
        HeadDrafter(llama, head_config(llama, FixedLength(2)), DraftWeights())


def test_nothing_stands_in_beside_heads(llama):
    with pytest.raises(InvalidInputError, match="cannot also have bridges or draft layers"):
        DraftWeights(layers=random_layers(llama, {2: 8}), heads=random_heads(llama, "medusa"))


def test_a_profile_with_heads_leaves_nothing_out(llama, tmp_path):
    heads = DraftWeights(heads=random_heads(llama, "medusa"))
    with pytest.raises(InvalidInputError, match=r"^draft heads: expected a skip set that skips nothing, got attn 1$"):
        profile_for(llama, heads, SkipSet(LAYERS, (1,)))
    path = tmp_path / "profile.json"
    profile_for(llama, heads).save(path)
    path.write_text(path.read_text().replace('"attention": []', '"attention": [1]'))
    with pytest.raises(InvalidProfileError) as error:
        DraftProfile.load(path)
    assert str(error.value) == (f"{path}: skip_set: expected nothing skipped, because draft heads draft; found attn 1")


def test_heads_are_no_model_of_their_own(llama, byte_tokenizer, tmp_path):
    model = LayerSkipModel(tiny_llama())
    profile = profile_for(model, DraftWeights(heads=random_heads(model, "medusa")))
    with pytest.raises(InvalidInputError, match=r"^as_assistant: the profile drafts with heads .*speculate"):
        profile.as_assistant(model.hf_model)
    with pytest.raises(InvalidInputError, match=r"^the profile drafts with heads .*no checkpoint for other engines"):
        export_draft(model, byte_tokenizer, profile, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_the_card_of_a_profile_says_that_heads_draft(llama):
    card = card_of(profile_for(llama, DraftWeights(heads=random_heads(llama, "medusa"))), "me/heads")
    assert "small heads on its hidden states propose a few tokens, and the target model verifies them" in card
    assert "sublayers named below" not in card
