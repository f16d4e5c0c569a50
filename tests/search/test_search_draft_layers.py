"""Searches that may use trained draft layers, on tiny models and a real SQLite file."""

import pytest
import torch

import search.search as search_module
from layerskip import DraftProfile, SkipSet, generate
from layerskip.drafting.bridges import BridgeFitter
from layerskip.drafting.config import DraftConfig
from layerskip.errors import InvalidInputError
from layerskip.fingerprint import identify
from search.draft_layers import trained_draft_layers
from search.settings import SAMPLERS
from search.space import SearchSpace
from search.warm_starts import STARTED_KEY
from studies.ranking import SOURCE_KEY, best_trials, candidate_key, evaluated_trials, speedup_of
from studies.study import load_study
from studies.view import view_study
from tests.models import LAYERS, near_tie_or_same, transformers_greedy
from tests.search.searches import MODEL_ID, explore, known_costs_of, small_search
from tests.trained import (
    BUSY,
    bridge_profile,
    layer_profile,
    perfect_bridge,
    perfect_layer,
    shifting_model,
)

IDS = list(range(3, 43))


@pytest.fixture(autouse=True, scope="module")
def costs():
    """Costs that are the same on every machine make predictions the same."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search_module, "measure_costs", known_costs_of)
        yield


@pytest.fixture(scope="module")
def shifting():
    return shifting_model()


def search_with(model, storage, *profiles, cold=False, **named):
    """A search that may use the draft layers of these profiles; a cold one gets no warm starts."""
    trained = trained_draft_layers(dict(enumerate(profiles)), model)
    space = named.pop("space", SearchSpace(model.num_layers, draft_layers=tuple(one.ref for one in trained)))
    search = small_search(model, storage, space=space, draft_layers=trained, **{"finalists": 1} | named)
    if cold:
        search.open().set_user_attr(STARTED_KEY, True)
    return search


def tried(study, search):
    return [search.task.space.config(trial.params) for trial in evaluated_trials(study)]


@pytest.mark.parametrize(("sampler", "perfect"), [("tpe", perfect_layer), ("greybox", perfect_bridge)])
def test_a_perfect_draft_layer_is_found_without_warm_starts(shifting, storage, sampler, perfect):
    search = search_with(shifting, storage, perfect(shifting), cold=True, trials=40, sampler=sampler)
    study = explore(search)
    assert not any(SOURCE_KEY in trial.user_attrs for trial in evaluated_trials(study))
    best = max(evaluated_trials(study), key=speedup_of)
    candidate = search.task.space.config(best.params)
    assert candidate.draft_layer == search.task.space.draft_layers[0]
    assert candidate.skip_set == SkipSet(LAYERS, tuple(range(BUSY, LAYERS)), tuple(range(BUSY, LAYERS)))
    assert best.user_attrs["acceptance"] == 1
    without = [trial for trial in evaluated_trials(study) if not trial.params["draft_layer"]]
    assert speedup_of(best) > max(map(speedup_of, without))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_tries_draft_layers_and_no_draft_under_two_names(shifting, storage, sampler):
    profiles = (layer_profile(shifting, start=3), perfect_bridge(shifting))
    search = search_with(shifting, storage, *profiles, cold=True, trials=14, sampler=sampler)
    study = explore(search)
    for trial in evaluated_trials(study):
        candidate = search.task.space.config(trial.params)
        assert search.task.space.parameters(candidate) == trial.params
    assert len({candidate.draft_layer for candidate in tried(study, search)}) >= 2


def test_a_draft_layer_as_it_was_trained_is_the_first_that_is_tried(llama, storage):
    profiles = [layer_profile(llama, start=6, vocabulary=IDS), bridge_profile(llama, start=2)]
    names = tuple(one.ref for one in trained_draft_layers(dict(enumerate(profiles)), llama))
    space = SearchSpace(LAYERS, bridges=True, vocabulary_sizes=(0, 40), draft_layers=names)
    search = search_with(llama, storage, *profiles, space=space, trials=7)
    study = explore(search)
    first, second, *others = tried(study, search)
    bridge, layer = names
    assert first == DraftConfig(SkipSet(LAYERS), draft_layer=bridge)
    assert second == DraftConfig(SkipSet(LAYERS), vocabulary_size=40, draft_layer=layer)
    below = [(one.draft_layer, len(one.skipped_below)) for one in others]
    assert below == [(bridge, 1), (layer, 1), (layer, 2), (layer, 4), (None, 0)]
    sources = [trial.user_attrs[SOURCE_KEY] for trial in evaluated_trials(study)]
    assert sources[:3] == [
        "trained draft layer 1 of 2",
        "trained draft layer 2 of 2",
        "trained draft layer 1 of 2, least damage: 1 of 2 sublayers",
    ]
    assert sources[-1] == "nothing skipped"
    draft = evaluated_trials(study)[1].user_attrs["draft"]
    assert draft.endswith(f" · {layer} · vocabulary 40")


def test_a_candidate_with_a_draft_layer_has_bridges_only_where_there_are_some_below_its_exit(
    llama, storage, monkeypatch
):
    monkeypatch.setattr(BridgeFitter, "is_cheaper", lambda self, start, stop: True)
    tuned = layer_profile(llama, start=4)
    [trained] = trained_draft_layers({"": tuned}, llama)
    space = SearchSpace(LAYERS, bridges=True, draft_layers=(trained.ref,))
    search = search_with(llama, storage, tuned, space=space, cold=True, trials=2)
    study = search.open()
    for below in (SkipSet(LAYERS), SkipSet(LAYERS, mlp=(1,))):
        study.enqueue_trial(space.parameters(DraftConfig(below, bridges=True, draft_layer=trained.ref)))
    search.explore(study, search.prepare(study))
    drafts = [trial.user_attrs["draft"] for trial in evaluated_trials(study)]
    assert ["bridges" in draft for draft in drafts] == [False, True]


def test_the_profile_contains_the_draft_layer_and_changes_no_output(llama, storage, tmp_path):
    tuned = layer_profile(llama, start=4, vocabulary=IDS)
    [trained] = trained_draft_layers({"": tuned}, llama)
    space = SearchSpace(LAYERS, vocabulary_sizes=(0, 40), draft_layers=(trained.ref,))
    search = search_with(llama, storage, tuned, space=space, cold=True, trials=1)
    study = search.open()
    candidate = DraftConfig(SkipSet(LAYERS, mlp=(1,)), vocabulary_size=40, draft_layer=trained.ref)
    study.enqueue_trial(space.parameters(candidate))
    profile = search.run().profile
    assert profile.skip_set == SkipSet(LAYERS, (2, 3), (1, 2, 3))
    assert profile.provenance.training_seconds == 60.0
    profile.save(tmp_path / "found.json")
    loaded = DraftProfile.load(tmp_path / "found.json")
    assert loaded == profile
    assert (loaded.tensors.layers, loaded.tensors.vocabulary) == (1, 40)
    assert loaded.weights(llama).token_ids.tolist() == IDS
    for name, weight in loaded.weights(llama).layers[0].state_dict().items():
        assert torch.equal(weight, tuned.weights(llama).layers[0].state_dict()[name])
    generation = generate(llama, [1, 2, 3], drafter=loaded.drafter(llama), max_new_tokens=16)
    assert generation.stats.drafted > 0 or loaded.gate
    near_tie_or_same(llama.hf_model, [1, 2, 3], generation.tokens, transformers_greedy(llama.hf_model, [1, 2, 3], 16))
    assert [one.ref for one in trained_draft_layers({"": loaded}, llama)] == [trained.ref]  # it can be used again


def test_all_tokens_of_a_measured_candidate_with_a_perfect_draft_layer_are_accepted(shifting, storage):
    """What is estimated of it is what decoding shows: the outputs are compared, too."""
    search = search_with(shifting, storage, perfect_layer(shifting), trials=3, measuring_share=1.0, max_new_tokens=10)
    result = search.run()
    assert result.profile.tensors.layers == 1
    assert result.profile.measured.acceptance_rate == 1
    assert result.profile.model == identify(shifting, MODEL_ID)


def test_a_study_is_resumed_with_the_same_draft_layers_in_any_order(llama, storage):
    one, other = layer_profile(llama), bridge_profile(llama, start=6)
    first = search_with(llama, storage, one, other, trials=2).run()
    second = search_with(llama, storage, other, one, trials=5).run()
    assert (second.study, second.trials) == (first.study, 5)
    keys = [candidate_key(trial) for trial in evaluated_trials(load_study(storage, first.study))]
    assert len(set(keys)) == 5


def test_other_draft_layers_make_another_study_and_none_the_usual_one(llama, storage):
    plain = small_search(llama, storage, trials=1, finalists=1).run().study
    names = [
        search_with(llama, storage, *profiles, trials=1).run().study
        for profiles in ([layer_profile(llama)], [layer_profile(llama, seed=1)], [layer_profile(llama, vocabulary=IDS)])
    ]
    assert len({plain, *names}) == 4
    assert search_with(llama, storage, trials=1).run().study == plain


def test_a_named_study_is_not_resumed_with_other_draft_layers(llama, storage):
    search_with(llama, storage, layer_profile(llama), trials=1, study="s").run()
    with pytest.raises(InvalidInputError, match=r"^study 's': cannot be resumed, because this differs: space \("):
        search_with(llama, storage, layer_profile(llama, seed=1), trials=1, study="s").run()


def test_a_space_that_names_other_draft_layers_than_those_given_is_refused(llama, storage):
    [one] = trained_draft_layers({"": layer_profile(llama)}, llama)
    space = SearchSpace(LAYERS, draft_layers=(one.ref,))
    with pytest.raises(InvalidInputError, match=r"^space: names 1 draft layers, and 0 others were given"):
        small_search(llama, storage, space=space)


def test_a_candidate_that_keeps_nothing_below_its_exit_is_passed_over(llama, storage):
    search = search_with(llama, storage, layer_profile(llama, start=1), cold=True, trials=1)
    study = search.open()
    study.enqueue_trial(dict.fromkeys(search.task.space.bit_names, 1) | {"draft_layer": 1})
    search.explore(study, search.prepare(study))
    assert study.trials[0].state.name == "PRUNED"
    assert len(evaluated_trials(study)) == 1


def test_the_report_shows_what_a_draft_layer_skips_and_learns_nothing_of_sublayers_from_it(shifting, storage):
    result = search_with(shifting, storage, perfect_bridge(shifting), trials=6).run()
    view = view_study(storage, result.study)
    first = next(one for one in view.trials if one.source == "trained draft layer 1 of 1")
    assert first.config.draft_layer
    assert first.config.skip_set == SkipSet(LAYERS, tuple(range(BUSY, LAYERS)), tuple(range(BUSY, LAYERS)))
    assert "trained bridge after layer 2" in first.config.details
    assert any(not one.config.draft_layer for one in view.trials)
    assert len(view.trials) == 6
    assert best_trials(load_study(storage, result.study), 1)[0].params["draft_layer"] == 1
