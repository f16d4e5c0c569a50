"""What differs between two profiles."""

from dataclasses import replace

import torch
from hypothesis import given

from layerskip import DraftProfile, FixedLength, PromptLookup, SkipSet
from layerskip.drafting.weights import DraftWeights
from layerskip.profile import Provenance
from layerskip.profile_diff import differences
from tests.layerskip.test_profile import IDENTITY, MEASURED, a_profile, some_assets
from tests.models import LAYERS, random_heads, random_layers
from tests.strategies import skip_sets


def different(a, b):
    return {one.what: one for one in differences(a, b)}


def test_a_profile_and_its_copy_do_not_differ(tmp_path):
    profile = a_profile().with_assets(some_assets())
    profile.save(tmp_path / "copy.json")
    assert differences(profile, DraftProfile.load(tmp_path / "copy.json")) == []


def test_where_a_profile_comes_from_makes_no_difference():
    elsewhere = Provenance(created=a_profile().provenance.created.replace(year=2026), tool="by hand")
    assert differences(a_profile(), a_profile(provenance=elsewhere)) == []


@given(skip_sets(), skip_sets())
def test_what_only_one_leaves_out_is_named_and_adds_up(one, other):
    found = different(a_profile(skip_set=one), a_profile(skip_set=other))
    if one == other:
        assert found == {}
        return
    difference = found.pop("skipped")
    assert found == {}
    assert (difference.a, difference.b) == (str(one), str(other))
    masks = list(zip(one.mask, other.mask, strict=True))
    notes = []
    for letter, only in (("A", [a and not b for a, b in masks]), ("B", [b and not a for a, b in masks])):
        notes += [f"only in {letter}: {SkipSet.from_mask(only)}"] * any(only)
    assert difference.notes == tuple(notes)


def test_models_drafts_and_gates_are_compared():
    other = a_profile(
        model=replace(IDENTITY, fingerprint="f" * 16, id="elsewhere"), draft_exit=FixedLength(1), gate=0.3
    )
    found = different(a_profile(), other)
    assert found.keys() == {"model.fingerprint", "draft", "gate"}
    assert (found["draft"].a, found["draft"].b) == ("confidence below 0.5, at most 6 tokens", "1 token")
    assert (found["gate"].a, found["gate"].b) == (0.0, 0.3)


def test_a_profile_that_copies_nothing_has_no_copies_to_compare():
    found = different(a_profile(ngrams=PromptLookup()), a_profile())
    assert found.keys() == {"copies"}
    assert (found["copies"].a, found["copies"].b) == (str(PromptLookup()), None)


def test_models_of_another_depth_are_compared_without_naming_sublayers():
    deeper = a_profile(model=replace(IDENTITY, num_layers=LAYERS + 1), skip_set=SkipSet(LAYERS + 1, (1,), (4,)))
    found = different(a_profile(), deeper)
    assert (found["model.num_layers"].a, found["model.num_layers"].b) == (LAYERS, LAYERS + 1)
    assert (found["skipped"].b, found["skipped"].notes) == ("attn 1 · mlp 4", ())


def test_bridges_are_compared_by_what_they_stand_for_and_by_their_weights():
    bare, bridged = a_profile(), a_profile().with_assets(some_assets())
    added = different(bare, bridged)
    assert (added["bridges"].a, added["bridges"].b) == ([], ["2-3", "5-5"])
    refitted = different(bridged, a_profile().with_assets(some_assets(1)))
    assert refitted.keys() == {"bridges"}
    assert refitted["bridges"].notes == ("other weights in 2-3",)


def test_trained_layers_are_compared_by_what_they_stand_for_and_by_their_weights(llama):
    bare = a_profile()
    trained, trained_anew, like_another = (
        a_profile().with_assets(DraftWeights(layers=random_layers(llama, {2: 6}, **made)))
        for made in ({}, {"seed": 1}, {"like": 0})
    )
    added = different(bare, trained)
    assert (added["layers"].a, added["layers"].b) == ([], ["2-5"])
    for other in (trained_anew, like_another):
        found = different(trained, other)
        assert found.keys() == {"layers"}
        assert found["layers"].notes == ("other weights in 2-5",)
    assert different(trained, a_profile().with_assets(trained.assets)) == {}


def test_vocabularies_are_compared_by_size_and_by_what_they_share():
    whole, three, two = (
        a_profile().with_assets(DraftWeights(token_ids=None if ids is None else torch.tensor(ids)))
        for ids in (None, [0, 3, 5], [3, 7])
    )
    against_all = different(whole, three)["vocabulary"]
    assert (against_all.a, against_all.b, against_all.notes) == (0, 3, ("0 is the whole one",))
    against_other = different(three, two)["vocabulary"]
    assert (against_other.a, against_other.b, against_other.notes) == (3, 2, ("1 in both",))


def test_measured_figures_and_machines_are_compared_and_whether_the_difference_is_more_than_noise():
    def against(**changed):
        return different(a_profile(), a_profile(measured=MEASURED.model_copy(update=changed)))

    slower = against(speedup=0.9, speedup_low=0.85, speedup_high=0.95, device="another")
    assert {"measured.speedup", "measured.speedup_low", "measured.device"} <= slower.keys()
    assert slower["measured.speedup"].notes == ("the 95 % intervals lie apart",)
    assert against(speedup=1.22)["measured.speedup"].notes == ("the 95 % intervals overlap",)
    never = different(a_profile(), a_profile(measured=None))
    assert (never["measured"].a, never["measured"].b) == (1.25, None)


def test_draft_heads_differ_by_kind_number_and_weights(llama):
    def with_heads(kind, count, seed=0):
        assets = DraftWeights(heads=random_heads(llama, kind, count, seed=seed))
        return a_profile(skip_set=SkipSet(LAYERS)).with_assets(assets)

    one = with_heads("hydra", 2)
    assert different(one, with_heads("hydra", 2)) == {}
    found = different(one, with_heads("medusa", 3))["draft heads"]
    assert (found.a, found.b, found.notes) == ("2 hydra", "3 medusa", ())
    assert different(one, with_heads("hydra", 2, seed=1))["draft heads"].notes == ("other weights",)
    assert different(one, a_profile(skip_set=SkipSet(LAYERS)))["draft heads"].b == "none"
