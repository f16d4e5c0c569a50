"""A search from its first trial to the profile, on tiny models and a real SQLite file."""

import json
import math
from dataclasses import fields

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from layerskip import DraftProfile, FixedLength, InvalidInputError, LayerSkipModel, SkipSet, identify
from layerskip.engine import GraphEngine
from layerskip.engine.graphs import call_directly
from layerskip.errors import LosslessnessError
from search.measure import Summary
from search.space import Candidate, SearchSpace
from search.study import SOURCE_KEY, Search, SearchSettings
from studies.storage import open_storage
from studies.study import load_study
from tests.models import LAYERS, tiny_gemma2, tiny_llama
from tests.search.searches import (
    MODEL_ID,
    CtrlC,
    Log,
    random_prompts,
    ratio,
    records,
    small_search,
    widths_disagree,
)

SPACE = SearchSpace(LAYERS)


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """A finished search: its result, its storage, its prompts, its log and its study."""
    storage = open_storage(f"sqlite:///{tmp_path_factory.mktemp('finished')}/studies.db")
    prompts, log = random_prompts(search=4, held_out=2), Log()
    result = small_search(llama, storage, prompts=prompts, observer=log, trials=5, prompts_per_trial=3).run()
    return result, storage, prompts, log, load_study(storage, result.study)


def completed(study):
    return study.get_trials(states=(TrialState.COMPLETE,))


def summary_of(trial):
    return Summary(**{field.name: trial.user_attrs[field.name] for field in fields(Summary)})


def test_a_search_completes_the_trials_that_it_was_asked_for(finished):
    result, _, _, _, study = finished
    assert result.trials == len(completed(study)) == 5
    assert not result.interrupted


def test_the_value_of_a_trial_is_the_ratio_of_the_recorded_times(finished):
    result, storage, _, _, study = finished
    for trial in completed(study):
        assert math.isclose(trial.value, ratio(records(storage, result.study, prompt_set="search", trial=trial.number)))


def test_a_trial_records_every_prompt_that_it_decoded(finished):
    result, storage, prompts, _, study = finished
    allowed = {prompt.id for prompt in prompts.search[:3]}
    for trial in completed(study):
        recorded = records(storage, result.study, prompt_set="search", trial=trial.number)
        ids = [record.prompt for record in recorded]
        assert len(set(ids)) == len(ids) == trial.user_attrs["prompts"]
        assert set(ids) == allowed or (trial.user_attrs["stopped_early"] and set(ids) < allowed)
        for record in recorded:
            assert record.tokens == record.draft_tokens == 6
            assert 0 <= record.accepted <= record.drafted
            assert min(record.plain_seconds, record.draft_seconds) > 0
            assert not record.near_tie


def test_a_trial_says_what_it_tried_and_what_it_measured(finished):
    result, storage, _, _, study = finished
    for trial in completed(study):
        candidate = SPACE.candidate(trial.params)
        assert trial.user_attrs["skip_set"] == str(candidate.skip_set)
        assert trial.user_attrs["draft_exit"] == str(candidate.draft_exit)
        summary = summary_of(trial)
        recorded = records(storage, result.study, prompt_set="search", trial=trial.number)
        drafted = sum(record.drafted for record in recorded)
        assert summary.speedup == trial.value
        assert summary.acceptance_rate == (sum(r.accepted for r in recorded) / drafted if drafted else None)
        assert summary.speedup_low <= trial.value * (1 + 1e-9)


def test_the_first_trial_is_a_starting_point_and_says_so(finished):
    first, *later = finished[4].trials
    assert first.user_attrs[SOURCE_KEY].startswith("evenly spaced: attention")
    assert SPACE.candidate(first.params).skip_set == SkipSet(LAYERS, attention=(2,))
    assert all(SOURCE_KEY not in trial.user_attrs for trial in later)


def test_the_best_trials_are_measured_again_on_every_held_out_prompt(finished):
    result, storage, prompts, _, study = finished
    again = records(storage, result.study, prompt_set="held-out")
    ranked = sorted(completed(study), key=lambda trial: trial.value, reverse=True)
    assert {record.trial for record in again} == {trial.number for trial in ranked[:2]}
    for trial in ranked[:2]:
        ids = [record.prompt for record in again if record.trial == trial.number]
        assert sorted(ids) == sorted(prompt.id for prompt in prompts.held_out)


def test_no_trial_sees_a_held_out_prompt(finished):
    result, storage, *_ = finished
    searched = {record.prompt for record in records(storage, result.study, prompt_set="search")}
    assert not searched & {record.prompt for record in records(storage, result.study, prompt_set="held-out")}


def test_the_figures_of_the_profile_are_those_of_the_held_out_prompts(finished):
    result, storage, _, _, study = finished
    profile, measured = result.profile, result.profile.measured
    recorded = records(storage, result.study, prompt_set="held-out", trial=profile.provenance.trial)
    assert math.isclose(measured.speedup, ratio(recorded))
    assert measured.speedup_low <= measured.speedup * (1 + 1e-9)
    assert measured.speedup <= measured.speedup_high * (1 + 1e-9)
    speeds = (measured.plain_tokens_per_second, measured.speculative_tokens_per_second)
    assert math.isclose(speeds[0], sum(r.tokens for r in recorded) / sum(r.plain_seconds for r in recorded))
    assert math.isclose(speeds[1], sum(r.draft_tokens for r in recorded) / sum(r.draft_seconds for r in recorded))
    assert measured.acceptance_rate == sum(r.accepted for r in recorded) / sum(r.drafted for r in recorded)
    assert (measured.prompts, measured.prompt_set, measured.max_new_tokens) == (2, "held-out", 6)
    assert (measured.near_ties, measured.dtype) == (0, "float32")
    assert SPACE.candidate(study.trials[profile.provenance.trial].params) == Candidate(
        profile.skip_set, profile.draft_exit
    )


def test_the_profile_is_that_of_the_fastest_finalist(finished):
    result, storage, *_ = finished
    by_trial = {}
    for record in records(storage, result.study, prompt_set="held-out"):
        by_trial.setdefault(record.trial, []).append(record)
    assert len(by_trial) == 2
    assert result.profile.provenance.trial == max(by_trial, key=lambda trial: ratio(by_trial[trial]))


def test_the_profile_can_be_saved_loaded_and_decoded_with(finished, llama, tmp_path):
    profile = finished[0].profile
    profile.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    assert loaded.model == identify(llama, MODEL_ID)
    loaded.drafter(llama)
    assert loaded.provenance.study == finished[0].study


def test_a_search_tells_how_it_goes(finished):
    result, _, _, log, study = finished
    names = [event for event, *_ in log.events]
    assert log.events[0] == ("study_opened", result.study, 0)
    trials = [numbers for event, *numbers in log.events if event == "trial_finished"]
    values = {trial.number: trial.value for trial in completed(study)}
    seen = []
    for count, number, best in trials:
        seen += [values[number]] if number in values else []
        assert count == len(seen)
        assert best == max(seen, default=None)
    assert count == 5
    assert names.index("finalists_chosen") > max(i for i, name in enumerate(names) if name == "trial_finished")
    assert ("finalists_chosen", 2) in log.events
    finalists = [numbers for event, *numbers in log.events if event == "finalist_measured"]
    assert [number for number, *_ in finalists] == [1, 2]
    assert max(speedup for *_, speedup in finalists) == result.profile.measured.speedup
    assert ("prompt_measured", 3, 3) in log.events
    assert ("prompt_measured", 2, 2) in log.events


def test_gemma_2_can_be_searched(gemma2, storage):
    result = small_search(gemma2, storage).run()
    assert result.profile.model.family == "gemma2"
    result.profile.drafter(gemma2)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_model_too_shallow_for_starting_points_can_be_searched(storage, num_layers):
    model = LayerSkipModel(tiny_llama(num_hidden_layers=num_layers))
    result = small_search(model, storage).run()
    assert result.trials == 3
    assert result.profile.skip_set.num_layers == num_layers


def test_a_trial_that_would_skip_everything_is_passed_over(llama, storage):
    name = small_search(llama, storage, trials=1).run().study
    study = load_study(storage, name)
    everything = {parameter: 1 for parameter in study.trials[0].params if parameter.startswith("skip_")}
    study.enqueue_trial(everything)
    result = small_search(llama, storage, trials=2).run()
    study = load_study(storage, name)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert study.trials[1].params == everything
    assert result.trials == 2
    assert not records(storage, name, trial=1)


def test_a_hopeless_trial_stops_early_and_keeps_the_speedup_of_the_prompts_it_did(llama, storage):
    prompts = random_prompts(search=12, held_out=1)
    settings = {"prompts": prompts, "prompts_per_trial": 12, "max_new_tokens": 12, "study_name": "s"}
    small_search(llama, storage, trials=1, **settings).run()
    study = load_study(storage, "s")
    nearly_nothing = SkipSet(LAYERS, mlp=tuple(range(LAYERS)))  # never right, and eight steps long
    study.enqueue_trial(SPACE.parameters(Candidate(nearly_nothing, FixedLength(8))))
    small_search(llama, storage, trials=2, **settings).run()
    hopeless = load_study(storage, "s").trials[1]
    assert SPACE.candidate(hopeless.params).skip_set == nearly_nothing
    assert hopeless.state == TrialState.COMPLETE
    assert hopeless.user_attrs["stopped_early"]
    recorded = records(storage, "s", prompt_set="search", trial=1)
    assert len(recorded) == hopeless.user_attrs["prompts"] < 12
    assert math.isclose(hopeless.value, ratio(recorded))


def test_the_same_search_finds_its_study_again_and_another_one_gets_its_own(llama, storage):
    first = small_search(llama, storage, trials=1).run().study
    assert first.startswith("tiny-model-")
    assert small_search(llama, storage, trials=2, seed=9, finalists=1, timeout=600).run().study == first
    others = {
        "longer outputs": small_search(llama, storage, trials=1, max_new_tokens=7),
        "fewer prompts": small_search(llama, storage, trials=1, prompts_per_trial=2),
        "other prompts": small_search(llama, storage, trials=1, prompts=random_prompts(seed=1)),
        "other weights": small_search(LayerSkipModel(tiny_llama(seed=1)), storage, trials=1),
    }
    names = {what: search.run().study for what, search in others.items()}
    assert len({first, *names.values()}) == 5, names


def test_the_study_can_be_named(llama, storage):
    result = small_search(llama, storage, trials=1, study_name="mine").run()
    assert result.study == "mine"
    assert result.profile.provenance.study == "mine"
    assert optuna.get_all_study_names(storage) == ["mine"]
    assert {record.study for record in records(storage, "mine")} == {"mine"}


@pytest.mark.parametrize("name", ["", "  "])
def test_a_study_needs_a_name_that_can_be_read(llama, storage, name):
    with pytest.raises(InvalidInputError, match=r"^study: the name is empty"):
        small_search(llama, storage, study_name=name)


def test_going_on_makes_only_the_missing_trials(llama, database):
    first = small_search(llama, open_storage(database), trials=2).run()
    before = load_study(open_storage(database), first.study).trials
    kept = {(r.id, r.trial, r.plain_seconds, r.draft_seconds) for r in records(open_storage(database), first.study)}

    log = Log()
    second = small_search(llama, open_storage(database), trials=4, observer=log).run()
    after = load_study(open_storage(database), first.study).trials
    assert second.study == first.study
    assert second.trials == len(completed(load_study(open_storage(database), first.study))) == 4
    assert after[: len(before)] == before
    recorded = records(open_storage(database), first.study)
    assert kept <= {(r.id, r.trial, r.plain_seconds, r.draft_seconds) for r in recorded}
    new = [r for r in recorded if r.id > max(key[0] for key in kept) and r.prompt_set == "search"]
    assert {r.trial for r in new} == {trial.number for trial in after[len(before) :]}
    assert log.events[0] == ("study_opened", first.study, 2)


@pytest.mark.parametrize("trials", [2, 1])
def test_a_study_with_enough_trials_is_only_measured_on_held_out_prompts_again(llama, storage, trials):
    first = small_search(llama, storage, trials=2).run()
    before = load_study(storage, first.study).trials
    searched = len(records(storage, first.study, prompt_set="search"))
    again = small_search(llama, storage, trials=trials).run()
    assert load_study(storage, first.study).trials == before
    assert len(records(storage, first.study, prompt_set="search")) == searched
    assert again.trials == 2
    assert again.profile.measured.prompt_set == "held-out"


def test_starting_points_are_tried_once_however_often_a_search_goes_on(storage):
    model = LayerSkipModel(tiny_llama(num_hidden_layers=8))
    for trials in (1, 2, 7):
        name = small_search(model, storage, trials=trials, prompts_per_trial=1, finalists=1).run().study
    sources = [trial.user_attrs.get(SOURCE_KEY) for trial in load_study(storage, name).trials]
    named = [source for source in sources if source]
    assert sources[:5] == named
    assert len(set(named)) == 5


def refused(search):
    with pytest.raises(InvalidInputError) as caught:
        search.run()
    message = str(caught.value)
    assert message.startswith("study 's': cannot go on, because this differs: ")
    assert "\n" not in message
    return message


def test_going_on_with_something_else_is_refused_and_the_difference_named(llama, storage):
    small_search(llama, storage, trials=1, study_name="s").run()
    trials_before = load_study(storage, "s").trials

    def other(model=llama, **changed):
        return small_search(model, storage, study_name="s", **changed)

    other_weights = LayerSkipModel(tiny_llama(seed=1))
    assert f"fingerprint (study: {identify(llama).fingerprint}, now: {identify(other_weights).fingerprint})" in refused(
        other(other_weights)
    )
    message = refused(other(prompts=random_prompts(seed=1)))
    assert f"prompts (study: {random_prompts().fingerprint}, now: {random_prompts(seed=1).fingerprint})" in message
    assert "max_new_tokens (study: 6, now: 7)" in refused(other(max_new_tokens=7))
    assert "prompts_per_trial (study: 3, now: 2)" in refused(other(prompts_per_trial=2))
    assert "dtype (study: float32, now: bfloat16)" in refused(other(LayerSkipModel(tiny_llama().bfloat16())))
    deeper = refused(other(LayerSkipModel(tiny_llama(num_hidden_layers=5)), max_new_tokens=7))
    assert "space (" in deeper
    assert "; max_new_tokens (study: 6, now: 7)" in deeper
    assert "family" not in refused(other(LayerSkipModel(tiny_gemma2())))
    assert load_study(storage, "s").trials == trials_before


def test_a_model_under_another_id_may_go_on(llama, storage):
    small_search(llama, storage, trials=1, study_name="s").run()
    moved = Search(
        llama,
        identify(llama, "/another/place"),
        random_prompts(),
        storage,
        SearchSettings(trials=2, max_new_tokens=6, prompts_per_trial=3),
        study_name="s",
    )
    assert moved.run().trials == 2


def proposals(storage, study):
    return [trial.params for trial in load_study(storage, study).trials]


def test_the_same_seed_makes_the_same_proposals(llama, storage):
    """As long as no measured speed, never twice the same, tells the sampler what to propose next."""
    names = {"one": 5, "same": 5, "other": 6}
    for name, seed in names.items():
        small_search(llama, storage, trials=5, prompts_per_trial=1, finalists=1, seed=seed, study_name=name).run()
    assert proposals(storage, "one")[:5] == proposals(storage, "same")[:5]
    assert proposals(storage, "one")[1:5] != proposals(storage, "other")[1:5]


def test_going_on_with_the_same_seed_does_not_propose_the_same_again(llama, storage):
    for trials in (2, 4):
        name = small_search(llama, storage, trials=trials, prompts_per_trial=1, seed=5, study_name="s").run().study
    tried = [json.dumps(parameters, sort_keys=True) for parameters in proposals(storage, name)]
    assert len(set(tried)) == len(tried) == 4


def test_ctrl_c_in_the_middle_of_a_trial_keeps_the_trials_before_it(llama, storage):
    # Two trials of three prompts, and one prompt more.
    result = small_search(llama, storage, trials=4, observer=CtrlC("prompt_measured", 7)).run()
    study = load_study(storage, result.study)
    assert result.interrupted
    assert result.trials == 2
    assert [trial.state for trial in study.trials[:3]] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    best = max(completed(study), key=lambda trial: trial.value)
    assert result.profile.provenance.trial == best.number
    assert result.profile.measured.prompt_set == "search"
    assert result.profile.measured.speedup == best.value
    assert len(records(storage, result.study, trial=2)) == 1
    assert not records(storage, result.study, prompt_set="held-out")


def test_an_interrupted_trial_is_tried_again_first_thing(llama, storage):
    name = small_search(llama, storage, trials=4, observer=CtrlC("prompt_measured", 7)).run().study
    interrupted = load_study(storage, name).trials[2]
    result = small_search(llama, storage, trials=4).run()
    trials = load_study(storage, name).trials
    assert result.trials == 4
    assert not result.interrupted
    assert trials[3].params == interrupted.params
    assert trials[3].state == TrialState.COMPLETE
    assert trials[3].user_attrs[SOURCE_KEY] == "interrupted trial 2"
    assert [trial.params for trial in trials].count(interrupted.params) == 2


def test_an_interrupted_starting_point_is_still_called_one(llama, storage):
    name = small_search(llama, storage, observer=CtrlC("prompt_measured", 1)).run().study
    small_search(llama, storage).run()
    trials = load_study(storage, name).trials
    assert trials[0].state == TrialState.FAIL
    assert trials[1].params == trials[0].params
    assert trials[1].user_attrs[SOURCE_KEY] == trials[0].user_attrs[SOURCE_KEY]


def test_ctrl_c_before_any_trial_is_done_leaves_no_profile_and_a_study_to_go_on_with(llama, storage):
    result = small_search(llama, storage, observer=CtrlC("prompt_measured", 1)).run()
    assert (result.interrupted, result.trials, result.profile) == (True, 0, None)
    assert small_search(llama, storage).run().trials == 3


@pytest.mark.parametrize("event", ["trial_finished", "finalists_chosen"])
def test_ctrl_c_between_trials_gives_the_best_profile_so_far(llama, storage, event):
    result = small_search(llama, storage, observer=CtrlC(event)).run()
    done = 1 if event == "trial_finished" else 3
    assert result.interrupted
    assert result.trials == done
    assert result.profile.measured.prompt_set == "search"
    study = load_study(storage, result.study)
    assert result.profile.measured.speedup == study.best_value
    assert not study.get_trials(states=(TrialState.FAIL,))


@pytest.mark.parametrize(
    ("kind", "method", "count"),
    [
        (optuna.Trial, "suggest_categorical", 5),
        (RDBStorage, "set_trial_user_attr", 2),
        (RDBStorage, "set_trial_state_values", 1),
    ],
    ids=["choosing", "noting", "finishing"],
)
def test_ctrl_c_while_a_trial_is_stored_loses_neither_a_trial_nor_the_profile(
    storage, kind, method, count, monkeypatch
):
    model = LayerSkipModel(tiny_llama(num_hidden_layers=8))
    name = small_search(model, storage, trials=1).run().study
    original, calls = getattr(kind, method), []

    def interrupted(*arguments, **named):
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(kind, method, interrupted)
        result = small_search(model, storage).run()
    assert (result.interrupted, result.trials) == (True, 1)
    assert result.profile.provenance.trial == 0
    second = load_study(storage, name).trials[1].system_attrs["fixed_params"]
    assert small_search(model, storage, trials=5).run().trials == 5
    if method != "set_trial_state_values":  # that leaves the trial running, until its heartbeat tells that it died
        assert second in [trial.params for trial in completed(load_study(storage, name))]


def test_starting_points_that_a_kill_kept_from_being_queued_are_queued_later(storage):
    model = LayerSkipModel(tiny_llama(num_hidden_layers=8))
    search = small_search(model, storage, trials=1)
    name = search.run().study
    queued = [trial for trial in load_study(storage, name).trials if trial.state == TrialState.WAITING]
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DELETE FROM trials WHERE number = {queued[-1].number}"))
    small_search(model, storage, trials=1).run()
    trials = load_study(storage, name).trials
    assert queued[-1].system_attrs["fixed_params"] in [trial.system_attrs.get("fixed_params") for trial in trials]


def test_ctrl_c_among_the_finalists_gives_the_best_of_those_measured(llama, storage):
    result = small_search(llama, storage, observer=CtrlC("finalist_measured")).run()
    assert result.interrupted
    recorded = records(storage, result.study, prompt_set="held-out")
    assert {record.trial for record in recorded} == {result.profile.provenance.trial}
    assert result.profile.measured.prompt_set == "held-out"
    assert math.isclose(result.profile.measured.speedup, ratio(recorded))


def test_a_draft_that_changes_the_output_ends_the_search_as_a_bug(storage):
    model = LayerSkipModel(tiny_llama())
    search = small_search(model, storage, study_name="s")
    with widths_disagree(model), pytest.raises(LosslessnessError, match="bug"):
        search.run()
    states = [trial.state for trial in load_study(storage, "s").trials]
    assert TrialState.COMPLETE not in states
    assert TrialState.PRUNED not in states
    assert states.count(TrialState.FAIL) == 1
    assert not records(storage, "s")


def test_a_time_limit_ends_the_search_after_the_trial_that_passes_it(llama, storage):
    result = small_search(llama, storage, trials=1000, timeout=1e-9).run()
    assert not result.interrupted
    assert result.trials <= 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("trials", 0),
        ("max_new_tokens", 0),
        ("prompts_per_trial", -1),
        ("finalists", 0),
        ("held_out_prompts", 0),
        ("timeout", 0.0),
        ("timeout", -1.0),
        ("timeout", math.nan),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(setting, value):
    with pytest.raises(InvalidInputError, match=f"^{setting}: expected .*, got "):
        SearchSettings(**{setting: value})


def test_the_largest_seed_can_be_gone_on_with(llama, storage):
    for trials in (1, 2):
        assert small_search(llama, storage, trials=trials, seed=2**32 - 1).run().trials == trials


def test_a_study_belongs_to_an_engine(storage):
    model = LayerSkipModel(tiny_llama())
    eager = small_search(model, storage, trials=1).run()
    model.engine = GraphEngine(model, call_directly)
    captured = small_search(model, storage, trials=1).run()
    assert captured.study != eager.study
    assert captured.profile.measured.device == f"{eager.profile.measured.device}, cuda-graphs"
