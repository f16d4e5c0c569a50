"""Which stand-in of a profile a search may use, and what its drafts are made of and cost."""

import numpy as np
import pytest
import torch

from layerskip import DraftProfile, LayerSkipModel, SkipSet
from layerskip.costs import DraftParts
from layerskip.drafting.bridges import Bridge, BridgeFitter
from layerskip.drafting.config import DraftConfig, DraftLayerRef
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError, InvalidProfileError
from search.builder import DraftBuilder
from search.draft_layers import trained_draft_layer, trained_draft_layers
from search.reference import record
from search.samplers import DraftCosts
from search.space import SearchSpace
from tests.models import LAYERS, VOCABULARY, random_heads, random_layers, tiny_llama
from tests.search.searches import known_costs, random_prompts
from tests.trained import bridge_profile, layer_profile, profile_with

TOP = 2 * LAYERS
IDS = list(range(3, 23))
NOTHING = SkipSet(LAYERS)


def named(model, profile):
    return trained_draft_layer("tuned.json", profile, model).ref


def test_a_stand_in_is_named_by_what_it_is(llama):
    name = named(llama, layer_profile(llama, start=4, vocabulary=IDS))
    assert (name.start, name.stop, name.kind, name.vocabulary_size, len(name.sha256)) == (4, TOP, "layer", 20, 16)
    assert str(name) == f"trained layer after layer 2 ({name.sha256[:8]})"
    other = named(llama, bridge_profile(llama, start=3))
    assert (other.start, other.kind, other.vocabulary_size) == (3, "bridge", 0)
    assert str(other) == f"trained bridge after attn 1 ({other.sha256[:8]})"


def test_it_has_the_same_name_wherever_its_profile_was_saved(llama, tmp_path):
    profile = layer_profile(llama, vocabulary=IDS)
    profile.save(tmp_path / "tuned.json")
    assert named(llama, DraftProfile.load(tmp_path / "tuned.json")) == named(llama, profile)
    in_half = LayerSkipModel(tiny_llama().bfloat16())
    assert named(in_half, profile_with(in_half, profile.weights(in_half))) == named(llama, profile)


def test_whatever_differs_has_another_name(llama):
    profiles = [
        layer_profile(llama),
        layer_profile(llama, seed=1),
        layer_profile(llama, start=6),
        layer_profile(llama, vocabulary=IDS),
        layer_profile(llama, vocabulary=[2, *IDS[1:]]),
        bridge_profile(llama),
    ]
    assert len({named(llama, profile) for profile in profiles}) == len(profiles)


def test_the_profile_of_a_search_that_used_one_has_the_same_one(llama):
    """With more left out below, and a bridge there."""
    tuned = layer_profile(llama, vocabulary=IDS)
    below = Bridge(1, 3, (torch.zeros(32, 32),), torch.zeros(32))
    layers, ids = tuned.weights(llama).layers, tuned.weights(llama).token_ids
    found = profile_with(llama, DraftWeights(bridges=[below], layers=layers, token_ids=ids))
    assert named(llama, found) == named(llama, tuned)


def test_the_same_ones_in_another_order_are_the_same(llama):
    one, other = layer_profile(llama), bridge_profile(llama, start=6)
    ordered = trained_draft_layers({"a": one, "b": other, "c": one}, llama)
    again = trained_draft_layers({"b": other, "a": one}, llama)
    assert [each.ref for each in ordered] == [each.ref for each in again]
    assert len(ordered) == 2
    assert [each.training_seconds for each in ordered] == [60.0, 60.0]


def test_a_profile_without_one_above_an_exit_is_refused_in_one_line(llama):
    def refusal(profile, error=InvalidInputError):
        with pytest.raises(error) as caught:
            trained_draft_layer("some.json", profile, llama)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    plain = profile_with(llama, DraftWeights())
    assert refusal(plain).startswith(
        "some.json: has no draft layer in place of the layers above an early exit; train one with "
    )
    middle = profile_with(
        llama, DraftWeights(layers=random_layers(llama, {2: 4})), skip_set=SkipSet(LAYERS, (1,), (1,))
    )
    assert "has no draft layer" in refusal(middle)
    heads = profile_with(llama, DraftWeights(heads=random_heads(llama, "medusa")), skip_set=NOTHING)
    assert refusal(heads).startswith("some.json: has draft heads, which draft without the stack")
    assert "'layerskip compare'" in refusal(heads)
    other = LayerSkipModel(tiny_llama(seed=1))
    assert "model.fingerprint: " in refusal(layer_profile(other), InvalidProfileError)
    small = LayerSkipModel(tiny_llama(intermediate_size=16))
    wrong = profile_with(llama, DraftWeights(layers=random_layers(small, {4: TOP})))
    assert refusal(wrong).startswith("some.json: draft layer: the weights do not fit this model: ")


def test_a_candidate_leaves_out_all_that_its_stand_in_stands_for():
    layer = DraftLayerRef(4, TOP, "layer", 0, "a")
    candidate = DraftConfig(SkipSet(LAYERS, mlp=(0, 2)), draft_layer=layer)
    assert candidate.skip_set == SkipSet(LAYERS, (2, 3), (0, 2, 3))
    assert candidate.skipped_below == SkipSet(LAYERS, mlp=(0,))
    assert candidate == DraftConfig(SkipSet(LAYERS, (3,), (0,)), draft_layer=layer)
    assert candidate.exit_at == 4
    assert str(candidate) == "attn 2-3 · mlp 0,2-3 · 4 tokens · trained layer after layer 2 (a)"
    with pytest.raises(InvalidInputError, match="at least one"):
        DraftConfig(SkipSet(LAYERS, (0, 1), (0, 1)), draft_layer=layer)
    with pytest.raises(InvalidInputError, match=r"^draft layer: ends before sublayer 8, but there are 6"):
        DraftConfig(SkipSet(3), draft_layer=layer)


def test_the_space_of_a_model_has_the_vocabularies_of_its_stand_ins(llama):
    names = [named(llama, layer_profile(llama, vocabulary=IDS)), named(llama, bridge_profile(llama))]
    space = SearchSpace.of(llama, draft_layers=names)
    assert space.vocabulary_sizes == (0, 20)
    assert SearchSpace.of(llama, vocabularies=False, draft_layers=names).vocabulary_sizes == (0,)
    assert space.describe()["draft_layers"][0] == {
        "start": 4,
        "stop": TOP,
        "kind": "layer",
        "vocabulary_size": 20,
        "sha256": names[0].sha256,
    }


@pytest.fixture
def given(llama):
    profiles = {"layer": layer_profile(llama, vocabulary=IDS), "bridge": bridge_profile(llama, start=5)}
    return {one.ref.kind: one for one in trained_draft_layers(profiles, llama)}


@pytest.fixture
def makers(llama, given, monkeypatch):
    monkeypatch.setattr(BridgeFitter, "is_cheaper", lambda self, start, stop: True)
    texts = [record(llama, prompt.tokens, [1, 2, 3], states=8) for prompt in random_prompts(search=4).search]
    return DraftBuilder(llama, texts, list(given.values()))


def test_a_candidate_gets_its_stand_in_and_what_it_asks_for_below(makers, given):
    layer = given["layer"]
    alone = makers.weights(DraftConfig(NOTHING, draft_layer=layer.ref))
    assert ([layer.start for layer in alone.layers], len(alone.bridges), alone.token_ids) == ([4], 0, None)
    assert all(torch.equal(w, layer.weights.layers[0].state_dict()[n]) for n, w in alone.layers[0].state_dict().items())
    below = SkipSet(LAYERS, (1,), (1,))  # next to what the stand-in stands for
    bridged = makers.weights(DraftConfig(below, bridges=True, draft_layer=layer.ref))
    assert {bridge.start: bridge.stop for bridge in bridged.bridges} == {2: 4}
    both = makers.weights(DraftConfig(below, bridges=True, draft_layer=given["bridge"].ref))
    assert {bridge.start: bridge.stop for bridge in both.bridges} == {2: 4, 5: TOP}
    assert len(both.layers) == 0


def test_its_own_vocabulary_stands_for_the_fitted_one_of_that_size(makers, given):
    def ids(vocabulary, kind):
        layer = given[kind].ref if kind else None
        return makers.weights(DraftConfig(NOTHING, vocabulary_size=vocabulary, draft_layer=layer)).token_ids

    assert ids(20, "layer").tolist() == IDS
    fitted = ids(20, None).tolist()
    assert len(fitted) == 20
    assert fitted != IDS
    assert ids(20, "bridge").tolist() == fitted
    assert len(ids(7, "layer")) == 7
    assert ids(0, "layer") is None


@pytest.mark.parametrize("kind", ["layer", "bridge"])
def test_what_is_estimated_with_a_stand_in_is_what_is_decoded_with(makers, given, kind):
    candidate = DraftConfig(SkipSet(LAYERS, (1,)), bridges=True, vocabulary_size=20, draft_layer=given[kind].ref)
    stack = makers.stack(candidate)
    drafter = makers.drafter(candidate)
    assert [index for index, _ in drafter._stack.steps] == [index for index, _ in stack.steps]
    assert torch.equal(drafter._stack.token_ids, stack.token_ids)
    assert drafter._stack.remembers == stack.remembers == (kind == "layer")
    assert isinstance(dict(stack.steps)[given[kind].ref.start], DraftLayer if kind == "layer" else Bridge)


@pytest.mark.parametrize("kind", ["layer", "bridge", None])
@pytest.mark.parametrize("bridges", [False, True])
def test_samplers_know_what_a_step_with_a_draft_layer_costs(makers, given, kind, bridges):
    layer = given[kind].ref if kind else None
    candidates = [
        DraftConfig(skip_set, bridges, layer, 20) for skip_set in (SkipSet(LAYERS, (1,), (0, 1)), SkipSet(LAYERS, (0,)))
    ]
    latency = known_costs(SearchSpace(LAYERS, vocabulary_sizes=(0, 20)))
    costs = latency.at(30).relative()
    expected = [costs.draft_step(DraftParts.of(makers.stack(candidate))) for candidate in candidates]
    masks = np.array([candidate.skip_set.mask for candidate in candidates])
    drafts = DraftCosts(costs, makers.num_bridges, max_draft_length=8)
    assert drafts.draft_steps(candidates[0], masks) == pytest.approx(expected)


def test_a_trained_layer_costs_a_layer_and_a_bridge_a_bridge(makers, given):
    latency = known_costs(SearchSpace(LAYERS, vocabulary_sizes=(0, 20)))
    seconds = {
        kind: latency.at(8).draft_step(DraftParts.of(makers.stack(DraftConfig(NOTHING, draft_layer=one.ref))))
        for kind, one in given.items()
    }
    assert seconds["layer"] == pytest.approx(latency.short.draft_step(DraftParts(3, 3)))  # two kept layers and itself
    assert seconds["bridge"] == pytest.approx(latency.short.draft_step(DraftParts(3, 2, 1)))


def test_vocabularies_are_no_larger_than_the_model(llama):
    everything = layer_profile(llama, vocabulary=list(range(VOCABULARY)))
    assert SearchSpace.of(llama, draft_layers=[named(llama, everything)]).vocabulary_sizes == (0,)
