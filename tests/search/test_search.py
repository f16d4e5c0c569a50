"""A search from its first trial to the profile, on tiny models and a real SQLite file."""

import itertools
import json
import math
from dataclasses import fields, replace
from functools import partial

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

import search.search as search_module
import search.space as space_module
from layerskip import DraftConfig, DraftProfile, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.costs import CostModel
from layerskip.drafting.bridges import BridgeFitter
from layerskip.engine import EagerEngine, GraphEngine, PackedEngine, measure_costs
from layerskip.errors import InvalidInputError, LayerSkipError, LosslessnessError
from layerskip.fingerprint import identify
from layerskip.packed_linear import packing_available
from search.callbacks import (
    FinalistMeasured,
    HeldOutPromptMeasured,
    PhaseStarted,
    PromptMeasured,
    ReferenceDecoded,
    ReferenceReady,
    StudyOpened,
    TrialFinished,
)
from search.measure import Summary
from search.objective import Objective
from search.predict import SpeedupPredictor
from search.pruner import MeasuringPruner, next_to_measure
from search.search import Search
from search.search_task import SearchTask
from search.settings import SAMPLERS, SearchSettings
from search.space import SearchSpace
from search.warm_starts import warm_starts
from studies.ranking import (
    REVISITS_KEY,
    SOURCE_KEY,
    basis_of,
    best_trials,
    candidate_key,
    completed_trials,
    config_of,
    evaluated_trials,
    is_stopped,
    measured_trials,
    predicted_trials,
    prediction_of,
    prompt_speedups,
    speedup_of,
)
from studies.storage import open_storage
from studies.study import load_study
from tests.capture import call_directly
from tests.models import LAYERS, VOCABULARY, near_tie_or_same, tiny_gemma2, tiny_llama, transformers_greedy
from tests.search.searches import (
    MODEL_ID,
    CtrlC,
    Log,
    explore,
    kind_of,
    known_costs,
    known_costs_of,
    random_prompts,
    ratio,
    records,
    small_search,
    widths_disagree,
)
from tests.search.test_reference import passes_counted

SPACE = SearchSpace(LAYERS)
# All but one of these searches begin with so many of their warm starts; what comes after is measured or sampled.
STARTS = 3
MEASURING = {"measuring_share": 1.0}


@pytest.fixture(autouse=True, scope="module")
def costs():
    """Costs that are the same on every machine make predictions the same; one test measures them for real."""
    measured = []

    def known(engine, **sizes):
        measured.append(engine)
        return known_costs_of(engine, **sizes)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search_module, "measure_costs", known)
        patched.setattr(search_module, "warm_starts", lambda *parts: itertools.islice(warm_starts(*parts), STARTS))
        yield measured


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """A finished search that measured: its result, its storage, its prompts, its log and its study."""
    storage = open_storage(f"sqlite:///{tmp_path_factory.mktemp('finished')}/studies.db")
    prompts, log = random_prompts(search=4, held_out=2), Log()
    search = small_search(llama, storage, prompts=prompts, on_event=log, trials=STARTS + 8, **MEASURING)
    result = search.run()
    return result, storage, prompts, log, load_study(storage, result.study)


def summary_of(trial):
    return Summary(**{field.name: trial.user_attrs[field.name] for field in fields(Summary)})


def new_study(storage, **named):
    """A named study in which nothing was tried, for a test to enqueue what is to be tried."""
    return small_search(named.pop("model"), storage, **named).open()


def with_no_starts(study):
    """Let a search begin with what the test enqueued alone."""
    study.set_user_attr("warm_starts", True)


def test_a_search_predicts_as_many_candidates_as_it_was_asked_for(finished):
    result, _, _, _, study = finished
    assert result.trials == len(evaluated_trials(study)) == STARTS + 8
    assert result.measured == len(measured_trials(study)) >= len(completed_trials(study)) >= 1
    assert not result.interrupted


def test_optuna_alone_tells_the_best_measured_speedup_and_every_prediction(finished):
    result, storage, _, _, study = finished
    plain = optuna.load_study(study_name=result.study, storage=str(storage.engine.url))
    best = plain.best_trial
    assert best.value == max(trial.value for trial in completed_trials(study)) == plain.best_value
    assert math.isclose(best.value, ratio(records(storage, result.study, prompt_set="search", trial=best.number)))
    for trial in plain.trials:
        steps = list(trial.intermediate_values)
        assert steps[0] == 0
        if trial.state == TrialState.COMPLETE:
            assert sorted(steps) == [0, 1, 2, 3]  # the prediction, then a speedup for each prompt
        else:
            assert trial.state == TrialState.PRUNED
            assert {"acceptance", "draft_cost", "config"} <= trial.user_attrs.keys()


def test_a_measured_value_is_the_ratio_of_the_recorded_times(finished):
    result, storage, prompts, _, study = finished
    ids = {step: prompt.id for step, prompt in enumerate(prompts.search[:3], start=1)}
    for trial in predicted_trials(study):
        recorded = records(storage, result.study, prompt_set="search", trial=trial.number)
        by_prompt = {record.prompt: ratio([record]) for record in recorded}
        assert len(by_prompt) == len(recorded)
        measured = {ids[step]: speedup for step, speedup in prompt_speedups(trial).items()}
        assert measured == pytest.approx(by_prompt)
        if trial.state == TrialState.COMPLETE:
            assert math.isclose(trial.value, ratio(recorded))
            assert by_prompt.keys() == set(ids.values())
        for record in recorded:
            assert record.tokens == record.draft_tokens == 6
            assert 0 <= record.accepted <= record.drafted
            assert min(record.plain_seconds, record.draft_seconds) > 0
            assert not record.near_tie


def test_what_is_only_predicted_decodes_nothing(finished):
    result, storage, _, _, study = finished
    measured = {trial.number for trial in study.trials if basis_of(trial) == "measured"}
    assert {record.trial for record in records(storage, result.study, prompt_set="search")} == measured


def test_a_promising_candidate_that_was_pruned_is_measured_by_a_second_trial(llama, storage, monkeypatch):
    monkeypatch.setattr(MeasuringPruner, "prune", lambda self, study, trial: REVISITS_KEY not in trial.user_attrs)
    result = small_search(llama, storage, trials=STARTS, **MEASURING).run()
    study = load_study(storage, result.study)
    assert result.trials == STARTS
    for trial in completed_trials(study):
        earlier = study.trials[trial.user_attrs[REVISITS_KEY]]
        assert (earlier.state, earlier.params) == (TrialState.PRUNED, trial.params)
        assert trial.user_attrs[SOURCE_KEY] == f"trial {earlier.number}, to be measured"
        assert prediction_of(trial) == prediction_of(earlier)
        for key in ("config", "draft", "acceptance", "draft_cost", "skip_set"):
            assert trial.user_attrs[key] == earlier.user_attrs[key]
    assert completed_trials(study)[0].params == max(evaluated_trials(study), key=prediction_of).params


def test_no_candidate_is_measured_twice(finished):
    measured = [candidate_key(trial) for trial in measured_trials(finished[4])]
    assert len(set(measured)) == len(measured)


def test_a_trial_records_its_candidate_and_its_result(finished):
    result, storage, _, _, study = finished
    for trial in predicted_trials(study):
        candidate, config = SPACE.config(trial.params), config_of(trial)
        assert trial.user_attrs["skip_set"] == str(candidate.skip_set)
        assert trial.user_attrs["draft"] == config.details
        assert SPACE.parameters(config) == trial.params
        assert 0 <= trial.user_attrs["acceptance"] <= 1
    for trial in completed_trials(study):
        summary = summary_of(trial)
        recorded = records(storage, result.study, prompt_set="search", trial=trial.number)
        drafted = sum(record.drafted for record in recorded)
        assert summary.speedup == trial.value
        assert summary.acceptance_rate == (sum(r.accepted for r in recorded) / drafted if drafted else None)
        assert summary.speedup_low <= trial.value * (1 + 1e-9)


def test_the_first_trials_are_warm_starts_and_say_so(finished):
    trials = finished[4].trials
    first = trials[0]
    assert first.user_attrs[SOURCE_KEY] == "nothing skipped"
    assert SPACE.config(first.params).skip_set == SkipSet(LAYERS)
    assert first.user_attrs["acceptance"] == 1
    sources = [trial.user_attrs.get(SOURCE_KEY) for trial in evaluated_trials(finished[4])]
    assert None not in sources[:STARTS]
    assert set(sources[STARTS:]) == {None}


def test_every_family_of_starts_is_tried_and_nothing_twice(llama, storage, monkeypatch):
    monkeypatch.setattr(search_module, "warm_starts", warm_starts)
    small_search(llama, storage, trials=40, finalists=1, study="s").run()
    trials = [trial for trial in load_study(storage, "s").trials if SOURCE_KEY in trial.user_attrs]
    sources = [trial.user_attrs[SOURCE_KEY] for trial in trials]
    families = {source.partition(":")[0] for source in sources}
    assert families >= {"nothing skipped", "evenly spaced", "least damage", "least change", "early exit"}
    assert len({json.dumps(trial.system_attrs["fixed_params"]) for trial in trials}) == len(trials)


def test_no_candidate_is_predicted_twice(finished):
    looked_at = [candidate_key(trial) for trial in evaluated_trials(finished[4])]
    assert len(set(looked_at)) == len(looked_at)


def test_finalists_are_the_best_by_what_was_measured_or_else_predicted(finished):
    result, storage, prompts, _, study = finished
    again = records(storage, result.study, prompt_set="held-out")
    chosen = best_trials(study, 2)
    assert {record.trial for record in again} == {trial.number for trial in chosen}
    for trial in chosen:
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
    trial = study.trials[profile.provenance.trial]
    assert SPACE.config(trial.params) == DraftConfig(profile.skip_set)
    config = config_of(trial)
    assert config.skip_set == profile.skip_set
    assert (config.stopping, config.target_confidence_threshold) == (
        profile.stopping,
        profile.target_confidence_threshold,
    )


def test_the_profile_is_that_of_the_fastest_finalist(finished):
    result, storage, *_ = finished
    by_trial = {}
    for record in records(storage, result.study, prompt_set="held-out"):
        by_trial.setdefault(record.trial, []).append(record)
    assert len(by_trial) == 2
    assert result.profile.provenance.trial == max(by_trial, key=lambda trial: ratio(by_trial[trial]))
    assert (result.shortfall is None) == (result.profile.measured.speedup > 1)


def test_the_profile_can_be_saved_loaded_and_decoded_with(finished, llama, tmp_path):
    profile = finished[0].profile
    profile.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    assert loaded.model == identify(llama, MODEL_ID)
    assert loaded.provenance.study == finished[0].study
    generation = generate(llama, [1, 2, 3], drafter=loaded.drafter(llama), max_new_tokens=12)
    expected = transformers_greedy(llama.hf_model, [1, 2, 3], 12)
    near_tie_or_same(llama.hf_model, [1, 2, 3], generation.tokens, expected)


def test_a_search_reports_its_progress(finished):
    result, _, _, log, study = finished
    kinds = [kind_of(event) for event in log.events if not isinstance(event, ReferenceDecoded)]
    assert kinds[:5] == [StudyOpened, "reference", ReferenceReady, "costs", "trials"]
    [opened] = log.of(StudyOpened)
    at_start = opened.progress
    assert (opened.name, at_start.evaluated, at_start.measured, at_start.best) == (result.study, 0, 0, None)
    finished_trials = log.of(TrialFinished)
    assert [event.trial.number for event in finished_trials] == [trial.number for trial in study.trials]
    for event in finished_trials:
        progress = event.progress
        so_far = [trial for trial in study.trials if trial.number <= event.trial.number]
        assert progress.evaluated == sum(REVISITS_KEY not in trial.user_attrs for trial in so_far)
        assert progress.measured == sum(basis_of(trial) == "measured" for trial in so_far)
        assert progress.best in [speedup_of(trial) for trial in so_far if basis_of(trial) == progress.basis]
    assert kinds.index("finalists") > max(i for i, kind in enumerate(kinds) if kind == TrialFinished)
    assert log.of("finalists") == [PhaseStarted("finalists", 4)]  # two prompts, twice
    assert [event.done for event in log.of(HeldOutPromptMeasured)] == [1, 2, 3, 4]
    finalists = log.of(FinalistMeasured)
    assert {event.trial.number for event in finalists} == {trial.number for trial in best_trials(study, 2)}
    assert max(event.speedup for event in finalists) == result.profile.measured.speedup
    measured = [trial.number for trial in completed_trials(study)]
    assert [event.done for event in log.of(PromptMeasured) if event.trial == measured[0]] == [0, 1, 2, 3]


@pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")
@pytest.mark.parametrize("in_place", [True, False])
def test_transformers_decoding_is_timed_and_announced_where_the_plain_weights_are_kept(storage, in_place):
    model, log = LayerSkipModel(tiny_llama()), Log()
    result = small_search(model, storage, engine=PackedEngine(model, in_place=in_place), on_event=log).run()
    assert (result.transformers is None) == in_place
    assert len(log.of("baseline")) == (0 if in_place else 1)


@pytest.mark.parametrize(("share", "is_controlled"), [(0.99, True), (0.97, False)])
def test_drafting_pauses_where_that_costs_little(llama, storage, monkeypatch, share, is_controlled):
    monkeypatch.setattr(search_module.SpeedupPredictor, "controlled_share", lambda *_: share)
    result = small_search(llama, storage, trials=STARTS, measuring_share=0.0).run()
    assert (result.profile.costs is not None) == is_controlled


def test_a_search_that_may_not_measure_measures_finalists_alone(llama, storage):
    result = small_search(llama, storage, trials=STARTS + 3, measuring_share=0.0).run()
    assert (result.trials, result.measured) == (STARTS + 3, 0)
    assert not records(storage, result.study, prompt_set="search")
    assert result.profile.measured.prompt_set == "held-out"
    study = load_study(storage, result.study)
    assert next_to_measure(study).number == best_trials(study, 1)[0].number


def test_costs_are_measured_once_for_a_study_and_kept_with_it(llama, storage, costs):
    costs.clear()
    name = small_search(llama, storage, trials=1).run().study
    small_search(llama, storage, trials=2).run()
    assert [engine.model for engine in costs] == [llama]
    kept = load_study(storage, name).user_attrs["latency"]
    assert CostModel.from_json(kept) == known_costs(SPACE)


def test_a_search_may_measure_its_own_costs(llama, storage, monkeypatch):
    monkeypatch.setattr(search_module, "measure_costs", measure_costs)
    result = small_search(llama, storage, trials=1, finalists=1).run()
    assert result.profile.measured.speedup > 0


def test_a_resumed_search_decodes_no_reference_again(llama, storage, tmp_path, monkeypatch):
    small_search(llama, storage, trials=1, folder=tmp_path).run()
    asked = []
    monkeypatch.setattr("search.search.measure_transformers", lambda *_: None)  # which generates, too
    monkeypatch.setattr(llama.hf_model, "generate", lambda *arguments, **named: asked.append(arguments))
    small_search(llama, storage, trials=2, folder=tmp_path).run()
    assert not asked
    assert list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_ends_the_search_in_one_line(llama, storage, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LayerSkipError, match=r"^[^\n]*LAYERSKIP_CACHE[^\n]*$"):
        small_search(llama, storage, folder=tmp_path / "file").run()


def passes_of_trials(search):
    """How many forward passes the trials of a search take."""
    with passes_counted(search._engine.model) as passes:
        search._on_event = lambda event: passes.clear() if event == PhaseStarted("trials") else None
        explore(search)
        return len(passes)


def test_predicting_a_candidate_takes_one_pass_for_each_batch_of_texts(llama, storage):
    assert passes_of_trials(small_search(llama, storage, trials=3)) == 3
    lots = small_search(llama, storage, trials=1, prompts=random_prompts(search=40))  # 20 texts: four, and two of eight
    assert passes_of_trials(lots) == 3


def test_gemma_2_can_be_searched(gemma2, storage):
    result = small_search(gemma2, storage, trials=STARTS + 2, **MEASURING).run()
    assert result.profile.model.family == "gemma2"
    result.profile.drafter(gemma2)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_model_too_shallow_for_warm_starts_can_be_searched(storage, num_layers):
    model = LayerSkipModel(tiny_llama(num_hidden_layers=num_layers))
    result = small_search(model, storage, trials=9).run()
    assert result.trials == 9  # more than there are candidates in one layer: repeats are answered, and counted
    assert result.profile.skip_set.num_layers == num_layers


def test_texts_of_one_token_can_be_searched(llama, storage):
    result = small_search(llama, storage, max_new_tokens=1, finalists=1).run()
    assert result.profile.measured.acceptance_rate is None


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_can_search(llama, storage, sampler):
    result = small_search(llama, storage, trials=STARTS + 6, finalists=1, sampler=sampler).run()
    assert result.trials == STARTS + 6


def test_a_candidate_that_was_predicted_before_is_not_traced_again(llama, storage):
    name = small_search(llama, storage, trials=2).run().study
    study = load_study(storage, name)
    first = study.trials[1]
    for trial in study.get_trials(states=(TrialState.WAITING,)):
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    study.enqueue_trial(first.params)
    assert not passes_of_trials(small_search(llama, storage, trials=3))
    again = predicted_trials(load_study(storage, name))[-1]
    assert again.params == first.params
    assert (prediction_of(again), again.user_attrs["predicted_by"]) == (prediction_of(first), first.number)
    assert config_of(again) == config_of(first)


def test_a_trial_that_would_skip_everything_is_passed_over(llama, storage):
    study = new_study(storage, model=llama)
    with_no_starts(study)
    everything = dict.fromkeys(SPACE.bit_names, 1)
    study.enqueue_trial(everything)
    result = small_search(llama, storage, trials=2).run()
    study = load_study(storage, result.study)
    assert study.trials[0].params == everything
    assert not study.trials[0].intermediate_values
    assert result.trials == len(study.trials) - 1 == 2


def test_a_measurement_that_cannot_win_stops_early_and_is_pruned(llama, storage, monkeypatch):
    monkeypatch.setattr(SearchSpace, "policies", lambda self, config: [replace(config, stopping=FixedLength(8))])
    hopeful = partial(SpeedupPredictor.predict, to_beat=())
    monkeypatch.setattr(
        SpeedupPredictor, "predict", lambda self, candidate, to_beat: replace(hopeful(self, candidate), speedup=1.0)
    )
    prompts = random_prompts(search=12, held_out=1)
    settings = {"prompts": prompts, "prompts_per_trial": 12, "max_new_tokens": 12, "study": "s", "finalists": 1}
    study = new_study(storage, model=llama, **settings)
    with_no_starts(study)
    nearly_nothing = SkipSet(LAYERS, mlp=tuple(range(LAYERS)))  # never right, and eight steps long
    for skip_set in (SkipSet(LAYERS), nearly_nothing):
        study.enqueue_trial(SPACE.parameters(DraftConfig(skip_set)))
    result = small_search(llama, storage, trials=2, **settings, **MEASURING).run()
    assert result.measured == 2
    best, hopeless = load_study(storage, "s").trials
    assert (best.state, hopeless.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert is_stopped(hopeless)
    assert SPACE.config(hopeless.params).skip_set == nearly_nothing
    recorded = records(storage, "s", prompt_set="search", trial=hopeless.number)
    assert len(recorded) == hopeless.user_attrs["prompts"] == len(prompt_speedups(hopeless)) < 12
    assert math.isclose(speedup_of(hopeless), ratio(recorded))


def test_the_same_search_finds_its_study_again_and_another_one_gets_its_own(llama, storage):
    quick = {"trials": 1, "finalists": 1}
    first = small_search(llama, storage, **quick).run().study
    assert first.startswith("tiny-model-")
    again = small_search(llama, storage, **quick | {"trials": 2, "seed": 9, "timeout": 600}).run()
    assert (again.study, again.trials) == (first, 2)
    others = {
        "longer outputs": small_search(llama, storage, **quick, max_new_tokens=7),
        "fewer prompts": small_search(llama, storage, **quick, prompts_per_trial=2),
        "other prompts": small_search(llama, storage, **quick, prompts=random_prompts(seed=1)),
        "other weights": small_search(LayerSkipModel(tiny_llama(seed=1)), storage, **quick),
        "another space": small_search(llama, storage, **quick, space=SearchSpace(LAYERS, 4)),
    }
    names = {what: search.open().study_name for what, search in others.items()}
    assert len({first, *names.values()}) == 6, names


def test_the_study_can_be_named(llama, storage):
    result = small_search(llama, storage, trials=1, study="mine").run()
    assert result.study == "mine"
    assert result.profile.provenance.study == "mine"
    assert optuna.get_all_study_names(storage) == ["mine"]
    assert {record.study for record in records(storage, "mine")} == {"mine"}


@pytest.mark.parametrize("name", ["", "  "])
def test_a_study_needs_a_name_that_can_be_read(llama, storage, name):
    with pytest.raises(InvalidInputError, match=r"^study: the name is empty"):
        small_search(llama, storage, study=name)


def test_a_resumed_search_makes_only_the_missing_trials(llama, database):
    first = small_search(llama, open_storage(database), trials=2).run()
    before = load_study(open_storage(database), first.study).trials
    log = Log()
    second = small_search(llama, open_storage(database), trials=4, on_event=log).run()
    after = load_study(open_storage(database), first.study).trials
    assert (second.study, second.trials) == (first.study, 4)
    assert after[:2] == before[:2]
    assert len(before) == 2  # none waits
    assert [SOURCE_KEY in trial.user_attrs for trial in after] == [True, True, True, False]  # the starts are done first
    assert len({candidate_key(trial) for trial in after}) == 4
    assert [event.trial.number for event in log.of(TrialFinished)] == [2, 3]
    [opened] = log.of(StudyOpened)
    assert (opened.progress.evaluated, opened.progress.best) == (2, max(prediction_of(trial) for trial in before[:2]))


@pytest.mark.parametrize("trials", [2, 1])
def test_a_study_with_enough_trials_is_only_measured_on_held_out_prompts_again(llama, storage, trials):
    first = small_search(llama, storage, trials=2).run()
    before = load_study(storage, first.study).trials
    again = small_search(llama, storage, trials=trials).run()
    assert load_study(storage, first.study).trials == before
    assert again.trials == 2
    assert again.profile.measured.prompt_set == "held-out"


def test_warm_starts_are_queued_once_however_often_a_search_is_resumed(llama, storage):
    for trials in (1, 2, STARTS + 1):
        name = small_search(llama, storage, trials=trials, finalists=1).run().study
    trials = load_study(storage, name).trials
    named = [trial for trial in trials if SOURCE_KEY in trial.user_attrs]
    assert [trial.number for trial in named] == list(range(STARTS))
    assert len({candidate_key(trial) for trial in trials}) == len(trials) == STARTS + 1


def test_a_short_search_without_time_measures_its_best_candidate_and_leaves_no_warm_start_waiting(llama, storage):
    result = small_search(llama, storage, trials=STARTS - 1, measuring_share=1e-9).run()
    study = load_study(storage, result.study)
    assert (result.trials, result.measured) == (STARTS - 1, 1)
    assert not study.get_trials(states=(TrialState.WAITING,))
    [measured] = completed_trials(study)
    assert prediction_of(measured) == max(map(prediction_of, evaluated_trials(study)))


def test_a_candidate_that_ctrl_c_kept_from_being_measured_is_measured_by_the_same_search(llama, storage):
    settings = {"trials": STARTS, "measuring_share": 1e-9}
    interrupted = small_search(llama, storage, on_event=CtrlC(PromptMeasured), **settings).run()
    assert (interrupted.interrupted, interrupted.trials, interrupted.measured) == (True, STARTS, 0)
    resumed = small_search(llama, storage, **settings).run()
    assert (resumed.interrupted, resumed.trials, resumed.measured) == (False, STARTS, 1)


def test_a_start_left_waiting_by_a_longer_search_keeps_no_candidate_from_being_measured(llama, storage):
    settings = {"measuring_share": 1e-9, "study": "s"}
    study = new_study(storage, model=llama, study="s")
    with_no_starts(study)
    for layer in range(3):
        study.enqueue_trial(SPACE.parameters(DraftConfig(SkipSet(LAYERS, attention=(layer,)))))
    result = small_search(llama, storage, trials=1, **settings).run()
    assert (result.measured, result.trials) == (1, 3)


def test_warm_starts_that_a_kill_kept_from_being_queued_are_queued_later(llama, storage, monkeypatch):
    original, queued = optuna.Study.enqueue_trial, []

    def killed_at_the_third(self, params, **named):
        queued.append(params)
        if len(queued) == 3:
            raise SystemExit
        original(self, params, **named)

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Study, "enqueue_trial", killed_at_the_third)
        with pytest.raises(SystemExit):
            small_search(llama, storage, study="s").run()
    small_search(llama, storage, study="s", trials=STARTS).run()
    trials = load_study(storage, "s").trials
    assert len(trials) == STARTS
    enqueued = [json.dumps(trial.system_attrs["fixed_params"]) for trial in trials]
    assert len(set(enqueued)) == STARTS


def refused(search):
    with pytest.raises(InvalidInputError) as caught:
        search.run()
    message = str(caught.value)
    assert message.startswith("study 's': cannot be resumed, because this differs: ")
    assert "\n" not in message
    return message


def test_resuming_with_something_else_is_refused_and_the_difference_named(llama, storage):
    small_search(llama, storage, trials=1, study="s").run()
    trials_before = load_study(storage, "s").trials

    def other(model=llama, **changed):
        return small_search(model, storage, study="s", **changed)

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


def test_a_study_can_be_resumed_with_the_model_under_another_id(llama, storage):
    small_search(llama, storage, trials=1, study="s").run()
    settings = SearchSettings(trials=2, max_new_tokens=6, prompts_per_trial=3)
    task = SearchTask(identify(llama, "/another/place"), random_prompts(), settings, SPACE, "s")
    assert Search(EagerEngine(llama), task, storage).run().trials == 2


def proposals(storage, study):
    return [trial.params for trial in load_study(storage, study).trials]


def test_the_same_seed_makes_the_same_search(llama, storage):
    for name, seed in {"one": 5, "same": 5, "other": 6}.items():
        small_search(llama, storage, trials=STARTS + 8, finalists=1, seed=seed, study=name).run()
    assert proposals(storage, "one") == proposals(storage, "same")
    assert proposals(storage, "one")[:STARTS] == proposals(storage, "other")[:STARTS]
    assert proposals(storage, "one") != proposals(storage, "other")
    values = [[trial.values for trial in load_study(storage, name).trials] for name in ("one", "same")]
    assert values[0] == values[1]


def test_a_search_resumed_with_the_same_seed_does_not_propose_the_same_again(llama, storage):
    for trials in (STARTS + 2, STARTS + 5):
        small_search(llama, storage, trials=trials, finalists=1, seed=5, study="s").run()
    tried = [json.dumps(parameters, sort_keys=True) for parameters in proposals(storage, "s")]
    assert len(set(tried)) == len(tried) == STARTS + 5


def test_ctrl_c_in_the_middle_of_a_measurement_keeps_the_trials_before_it_and_tries_again(llama, storage):
    settings = {"trials": STARTS + 4, "finalists": 1, **MEASURING}
    result = small_search(llama, storage, on_event=CtrlC(PromptMeasured, 3), **settings).run()
    study = load_study(storage, result.study)
    assert (result.interrupted, result.measured) == (True, 0)
    assert result.profile is None  # nothing was measured
    [broken] = study.get_trials(states=(TrialState.FAIL,))
    assert len(records(storage, result.study, trial=broken.number)) == 2
    before = study.trials[: broken.number]

    again = small_search(llama, storage, **settings).run()
    study = load_study(storage, result.study)
    assert study.trials[: broken.number] == before
    [retried, *_] = [trial for trial in study.trials[broken.number + 1 :] if trial.params == broken.params]
    assert not again.interrupted
    assert retried.state == TrialState.COMPLETE
    assert retried.user_attrs[SOURCE_KEY] == broken.user_attrs[SOURCE_KEY]
    assert again.trials == STARTS + 4


def interrupting(monkeypatch, method, count):
    """Press Ctrl-C at the ``count``-th call of a method."""
    (kind, name), calls = method, []
    original = getattr(kind, name)

    def pressed(*arguments, **named):
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(kind, name, pressed)


def test_a_start_that_ctrl_c_broke_off_is_tried_again_and_still_called_one(llama, storage, monkeypatch):
    with monkeypatch.context() as patched:
        interrupting(patched, (SpeedupPredictor, "predict"), 2)
        result = small_search(llama, storage, trials=5).run()
    assert (result.interrupted, result.trials, result.profile) == (True, 1, None)
    trials = load_study(storage, result.study).trials
    assert [trial.state for trial in trials[:2]] == [TrialState.PRUNED, TrialState.FAIL]

    again = small_search(llama, storage, trials=STARTS).run()
    trials = load_study(storage, result.study).trials
    assert (again.interrupted, again.trials) == (False, STARTS)
    [retried] = [t for t in predicted_trials(load_study(storage, result.study)) if t.params == trials[1].params]
    assert retried.user_attrs[SOURCE_KEY] == trials[1].user_attrs[SOURCE_KEY]


def test_what_the_sampler_proposed_and_ctrl_c_broke_off_is_tried_again_and_called_so(llama, storage, monkeypatch):
    with monkeypatch.context() as patched:
        interrupting(patched, (SpeedupPredictor, "predict"), STARTS + 2)
        name = small_search(llama, storage, trials=STARTS + 3).run().study
    broken = load_study(storage, name).trials[-2]
    assert broken.state == TrialState.FAIL
    small_search(llama, storage, trials=STARTS + 3, finalists=1).run()
    retried = load_study(storage, name).trials[broken.number + 1]
    assert retried.params == broken.params
    assert retried.user_attrs[SOURCE_KEY] == f"interrupted trial {broken.number}"


@pytest.mark.parametrize("event", ["reference", "costs", "trials"])
def test_ctrl_c_before_any_trial_is_done_leaves_no_profile_and_a_study_to_resume(llama, storage, event):
    result = small_search(llama, storage, on_event=CtrlC(event)).run()
    assert (result.interrupted, result.trials, result.profile) == (True, 0, None)
    assert small_search(llama, storage).run().trials == 3


@pytest.mark.parametrize(("event", "done"), [(TrialFinished, 1), ("finalists", 3)])
def test_ctrl_c_between_trials_keeps_them_all(llama, storage, event, done):
    result = small_search(llama, storage, on_event=CtrlC(event)).run()
    assert (result.interrupted, result.trials) == (True, done)
    assert not load_study(storage, result.study).get_trials(states=(TrialState.FAIL,))


def test_ctrl_c_after_a_measurement_gives_the_best_profile_so_far(llama, storage):
    settings = {"trials": STARTS + 6, **MEASURING}
    result = small_search(llama, storage, on_event=CtrlC(TrialFinished, STARTS + 1), **settings).run()
    assert result.interrupted
    study = load_study(storage, result.study)
    measured = completed_trials(study)
    assert result.measured == len(measured_trials(study)) >= len(measured) >= 1
    assert result.profile.measured.prompt_set == "search"
    assert result.profile.costs is None  # the search measures without pauses
    assert result.profile.measured.speedup == max(trial.value for trial in measured)
    assert result.profile.provenance.trial in [trial.number for trial in measured]


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ((optuna.Trial, "suggest_categorical"), 5),
        ((RDBStorage, "set_trial_user_attr"), STARTS + 2),
        ((RDBStorage, "set_trial_state_values"), 2),
    ],
    ids=["choosing", "noting", "finishing"],
)
def test_ctrl_c_while_a_trial_is_stored_loses_no_trial(llama, storage, method, count, monkeypatch):
    name = small_search(llama, storage, trials=1).run().study
    with monkeypatch.context() as patched:
        interrupting(patched, method, count)
        result = small_search(llama, storage, trials=4).run()
    assert result.interrupted
    assert result.trials >= 1
    [broken] = [t for t in load_study(storage, name).trials if t.state in (TrialState.FAIL, TrialState.RUNNING)]
    chosen = broken.system_attrs["fixed_params"]
    assert small_search(llama, storage, trials=STARTS + 1).run().trials == STARTS + 1
    if broken.state == TrialState.FAIL:  # or it runs until its heartbeat tells that it died
        assert chosen in [trial.params for trial in predicted_trials(load_study(storage, name))]


@pytest.mark.parametrize(("prompts", "kept"), [(1, False), (2, True), (3, True)])
def test_ctrl_c_among_the_finalists_keeps_figures_of_all_held_out_prompts_alone(llama, storage, prompts, kept):
    result = small_search(llama, storage, on_event=CtrlC(HeldOutPromptMeasured, prompts)).run()
    assert result.interrupted
    recorded = records(storage, result.study, prompt_set="held-out")
    assert (result.profile is not None) == kept
    assert len(recorded) == 4 * kept
    if kept:
        assert result.profile.measured.prompts == 2
        own = [record for record in recorded if record.trial == result.profile.provenance.trial]
        assert math.isclose(result.profile.measured.speedup, ratio(own))


def test_a_draft_that_changes_the_output_ends_the_search_as_a_bug(storage, monkeypatch):
    model = LayerSkipModel(tiny_llama())
    original = Objective._measured

    def measured(*arguments):
        with widths_disagree(model):
            return original(*arguments)

    monkeypatch.setattr(Objective, "_measured", measured)
    search = small_search(model, storage, study="s", trials=STARTS + 2, **MEASURING)
    with pytest.raises(LosslessnessError, match="bug"):
        search.run()
    states = [trial.state for trial in load_study(storage, "s").trials]
    assert states[0] == TrialState.FAIL
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
        ("workers", 0),
        ("timeout", 0.0),
        ("timeout", -1.0),
        ("timeout", math.nan),
        ("measuring_share", -0.1),
        ("measuring_share", 1.1),
        ("measuring_share", math.nan),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(setting, value):
    with pytest.raises(InvalidInputError, match=f"^{setting}: expected .*, got "):
        SearchSettings(**{setting: value})


def test_an_unknown_sampler_is_refused_and_the_known_ones_named():
    with pytest.raises(InvalidInputError, match=r"^sampler.* expected tpe, greybox"):
        SearchSettings(sampler="dice")


def test_a_study_with_the_largest_seed_can_be_resumed(llama, storage):
    for trials in (1, STARTS + 2):
        assert small_search(llama, storage, trials=trials, finalists=1, seed=2**32 - 1).run().trials == trials


def test_a_study_belongs_to_an_engine(storage):
    model = LayerSkipModel(tiny_llama())
    eager = small_search(model, storage, trials=1).run()
    engine = GraphEngine(model, call_directly)
    captured = small_search(model, storage, engine=engine, trials=1).run()
    assert captured.study != eager.study
    assert captured.profile.measured.device == f"{eager.profile.measured.device}, cuda-graphs"


@pytest.fixture
def rich(llama, storage, monkeypatch):
    """Searches with everything a draft can have, in the sizes of a tiny model."""
    monkeypatch.setattr(space_module, "_VOCABULARY_SIZES", (VOCABULARY // 2, 10**6))
    monkeypatch.setattr(BridgeFitter, "is_cheaper", lambda self, start, stop: True)
    space = SearchSpace.of(llama, precisions=["full"])
    return lambda **named: small_search(llama, storage, space=space, **named)


def test_a_search_saves_bridges_and_vocabulary_and_the_profile_decodes_with_them(llama, rich, storage, tmp_path):
    result = rich(trials=STARTS + 3, finalists=3, **MEASURING).run()
    result.profile.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert loaded == result.profile
    generation = generate(llama, [1, 2, 3], drafter=loaded.drafter(llama), max_new_tokens=12)
    expected = transformers_greedy(llama.hf_model, [1, 2, 3], 12)
    near_tie_or_same(llama.hf_model, [1, 2, 3], generation.tokens, expected)
    trial = load_study(storage, result.study).trials[result.profile.provenance.trial]
    assert f"vocabulary of {VOCABULARY // 2}" in result.profile.draft or not trial.params["vocabulary_size"]


def test_the_first_trials_of_a_rich_search_are_rich_and_say_so_where_there_is_something_to_bridge(rich, storage):
    name = rich(trials=2).run().study
    whole, skipping = predicted_trials(load_study(storage, name))
    for trial in (whole, skipping):
        assert (trial.params["bridges"], trial.params["vocabulary_size"]) == (True, VOCABULARY // 2)
    assert whole.user_attrs["skip_set"] == "nothing skipped"
    assert "bridges" not in whole.user_attrs["draft"]
    assert whole.user_attrs["draft"].endswith(f" · vocabulary {VOCABULARY // 2}")
    assert skipping.user_attrs["draft"].endswith(f" · bridges · vocabulary {VOCABULARY // 2}")


def test_a_rich_study_can_be_resumed_and_is_not_a_plain_one(llama, rich, storage):
    first = rich(trials=1).run()
    second = rich(trials=2).run()
    assert (second.study, second.trials) == (first.study, 2)
    assert small_search(llama, storage, trials=1).run().study != first.study


def test_a_search_finds_drafts_at_lower_precision_and_the_best_at_full_precision(llama, storage, tmp_path):
    space = SearchSpace(LAYERS, precisions=("full", "int8", "int4"))
    result = small_search(llama, storage, space=space, trials=STARTS + 4, finalists=1).run()
    study = load_study(storage, result.study)
    first, second = (config_of(trial) for trial in predicted_trials(study)[:2])
    assert [config.precision for config in (first, second)] == ["int4", "int8"]
    assert not len(first.skip_set)
    assert not len(second.skip_set)
    best, without = result.profile, result.full_precision
    promising = max(predicted_trials(study), key=prediction_of)
    assert config_of(promising).precision != "full"  # copies cost half here, and agree
    assert without is not None
    assert config_of(study.trials[without.trial]).precision == "full"
    recorded = records(storage, result.study, prompt_set="held-out", trial=without.trial)
    assert math.isclose(without.speedup, ratio(recorded))
    best.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert loaded.precision == best.precision
    generation = generate(llama, [1, 2, 3], drafter=loaded.drafter(llama), max_new_tokens=12)
    near_tie_or_same(llama.hf_model, [1, 2, 3], generation.tokens, transformers_greedy(llama.hf_model, [1, 2, 3], 12))


def test_a_search_at_one_precision_has_nothing_to_say_of_others(finished):
    assert finished[0].full_precision is None
