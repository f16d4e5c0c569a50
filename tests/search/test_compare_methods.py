"""The methods that take part in a comparison, and their names."""

import pytest
import torch

from benchmarks.add_profile import add_profile
from layerskip import LayerSkipModel, SkipSet
from layerskip.drafting.config import DraftConfig
from layerskip.drafting.prompt_lookup import PromptLookup
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine
from layerskip.errors import InvalidProfileError
from search.compare import layerskip_methods, named_profiles, ready_profiles_for, transformers_methods
from search.measure import draft_bytes
from tests.layerskip.test_profile import MEASURED
from tests.layerskip.test_ready_profiles import folder as folder
from tests.layerskip.test_transformers_integration import profile_for
from tests.models import LAYERS, random_layers, tiny_llama

TOP = 2 * LAYERS
PLAIN_CONFIG = DraftConfig(SkipSet(LAYERS))
EVERY_ATTENTION = SkipSet(LAYERS, attention=range(LAYERS))


@pytest.fixture(scope="module")
def model():
    return LayerSkipModel(tiny_llama())


@pytest.fixture(scope="module")
def profile(model):
    return profile_for(model.hf_model)


def names(methods):
    return [method.name for method in methods]


def test_layerskips_methods_are_plain_decoding_prompt_lookup_and_the_profiles(model, profile):
    methods = layerskip_methods(EagerEngine(model), {"mine": profile}, combine=False)
    assert names(methods) == ["plain decoding", "prompt lookup", "mine"]
    assert not any(method.third_party for method in methods)


def test_a_profile_is_combined_with_prompt_lookup_unless_it_has_its_own(model, profile):
    copying = profile.model_copy(update={"prompt_lookup": PromptLookup()})
    methods = layerskip_methods(EagerEngine(model), {"mine": profile, "copying": copying}, combine=True)
    assert names(methods)[2:] == ["mine", "mine + prompt lookup", "copying"]


@pytest.fixture(scope="module")
def trained(model):
    layers = random_layers(model, {TOP - 2: TOP}, like=LAYERS - 1)
    return profile_for(model.hf_model, SkipSet.early_exit(LAYERS, LAYERS - 1), weights=DraftWeights(layers=layers))


def test_all_of_them_decode_alike(model, profile, trained):
    profiles = {"mine": profile, "trained": trained}
    methods = layerskip_methods(EagerEngine(model), profiles, combine=True)
    methods += transformers_methods(model, profiles)[0]
    assert len({method.decode([1, 2, 3, 1, 2], 10).tokens for method in methods}) == 1


def test_transformers_modes_take_each_profile_as_an_assistant_that_can_be_one(model, profile, trained):
    unable = profile_for(model.hf_model, EVERY_ATTENTION)
    methods, left_out = transformers_methods(model, {"mine": profile, "unable": unable, "trained": trained})
    assert names(methods) == [
        "transformers plain",
        "transformers prompt lookup",
        "transformers early exit 2",
        "transformers assistant (mine)",
        "transformers assistant (trained)",
    ]
    assert all(method.third_party for method in methods)
    assert list(left_out) == ["transformers assistant (unable)"]
    assert "leaves out every attention" in left_out["transformers assistant (unable)"]


def test_a_profile_for_another_model_is_refused(profile):
    other = LayerSkipModel(tiny_llama(intermediate_size=16))
    with pytest.raises(InvalidProfileError, match="intermediate_size"):
        layerskip_methods(EagerEngine(other), {"mine": profile}, combine=False)


def test_how_long_a_draft_was_trained_comes_from_its_profile(model, profile):
    trained = profile.provenance.model_copy(update={"training_seconds": 180.0})
    methods = layerskip_methods(
        EagerEngine(model), {"mine": profile.model_copy(update={"provenance": trained})}, combine=True
    )
    assert [method.training_seconds for method in methods] == [None, None, 180.0, 180.0]


def test_the_memory_of_a_draft_is_that_of_its_tensors_and_of_its_rows_of_the_head(model):
    assert draft_bytes(model, PLAIN_CONFIG, DraftWeights()) == 0
    hidden = model.config.hidden_size
    ids = draft_bytes(model, PLAIN_CONFIG, DraftWeights(token_ids=torch.arange(10)))
    assert 4 * 10 * (hidden + 1) <= ids <= 4 * 10 * (hidden + 1) + 500  # float32 rows, 32-bit ids, a header
    layers = random_layers(model, {TOP - 2: TOP}, like=LAYERS - 1)
    weights = sum(weight.numel() for weight in layers[0].parameters())
    assert draft_bytes(model, PLAIN_CONFIG, DraftWeights(layers=layers)) >= 4 * weights
    copies = draft_bytes(model, DraftConfig(EVERY_ATTENTION, precision="int8"), DraftWeights())
    assert copies == model.copies.bytes_needed("int8", EVERY_ATTENTION.kept) > 0


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["a/rich.json", "b/plain.json"], ["rich", "plain"]),
        (["a/tuned.json", "b/tuned.json", "c.json"], ["a/tuned.json", "b/tuned.json", "c"]),
        (["a.json", "a.json"], ["a"]),
        (["smollm2", "makers/qwen2.5", "folder/"], ["smollm2", "qwen2.5", "folder"]),
        (["prompt lookup.json", "plain decoding"], ["prompt lookup.json", "plain decoding"]),
    ],
)
def test_profiles_are_called_by_their_files_stems_where_these_differ(sources, expected):
    assert list(named_profiles(sources, lambda source: source)) == expected


def test_ready_profiles_of_the_model_take_part_once(model, profile, folder, tmp_path):
    for name, of in (("tiny", model), ("other", LayerSkipModel(tiny_llama(seed=1)))):
        measured = profile_for(of.hf_model).model_copy(update={"measured": MEASURED})
        measured.save(tmp_path / f"{name}.json")
        add_profile(name, tmp_path / f"{name}.json", "cpu")
    found = ready_profiles_for(model, [], device="cpu", dtype="float32")
    assert list(found) == ["ready tiny"]
    assert found["ready tiny"].skip_set == profile.skip_set
    assert ready_profiles_for(model, found.values(), device="cpu", dtype="float32") == {}
