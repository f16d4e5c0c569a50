"""A study as its pictures need it."""

import json
from datetime import timedelta

import optuna
import pytest

from layerskip.costs import DraftParts
from layerskip.errors import InvalidInputError
from studies.ranking import best_trials
from studies.statistics import speedup_of_all, speedup_of_prompt
from studies.study import describe_study
from studies.view import costs_from, view_study
from tests.studies.synthetic_studies import BEGAN, StudyBuilder, costs_of


def test_a_trials_configuration_is_read_from_its_attributes(searched_storage, searched):
    study = optuna.load_study(study_name="s", storage=searched_storage)
    for one, trial in zip(searched.trials, study.trials, strict=True):
        assert str(one.config.skip_set) == trial.user_attrs["skip_set"]
        assert one.config.vocabulary_size == trial.params["vocabulary_size"]
        assert one.acceptance == trial.user_attrs["acceptance"]
        assert one.basis == ("measured" if len(trial.intermediate_values) > 1 else "predicted")
    assert len(searched.evaluated) == 25
    assert len(searched.measured) == 5
    assert searched.states == {"complete": 4, "pruned": 26}
    assert (searched.began, searched.ended) == (BEGAN, BEGAN + timedelta(seconds=30))


def test_finalists_come_first_and_then_the_best_as_the_study_ranks_them(searched_storage, searched):
    study = optuna.load_study(study_name="s", storage=searched_storage)
    ranked = [trial.number for trial in best_trials(study, 1000)]
    finals = [one for one in searched.ranked if one.held_out]
    assert len(finals) == 3
    described = describe_study(searched_storage, "s", 1000)["best"]
    assert [trial["number"] for trial in described] == [one.number for one in searched.ranked]
    stopped = {one.number for one in searched.ranked if one.stopped}
    assert stopped
    assert stopped <= {trial["number"] for trial in described if trial["given_up"]}
    assert list(searched.ranked[:3]) == sorted(finals, key=lambda one: one.held_out.value, reverse=True)
    assert [one.number for one in searched.ranked[3:]] == [n for n in ranked if n not in {one.number for one in finals}]


def test_measured_over_predicted_is_the_median_of_the_trials_measured_on_all_prompts(storage):
    builder = StudyBuilder(storage).predict(6)
    assert view_study(storage, "s").measured_over_predicted is None
    builder.measure(1, off=0.8).measure(1, off=0.9).measure(1, off=1.2).measure(1, off=0.1, stopped=True)
    assert view_study(storage, "s").measured_over_predicted == pytest.approx(0.9)


def test_predictions_for_the_prompts_that_were_measured_count(storage):
    """Which may be easier than all that predictions are for."""
    StudyBuilder(storage).predict(2).measure(1, off=0.9, off_here=1.02)
    assert view_study(storage, "s").measured_over_predicted == pytest.approx(1.02)


def test_held_out_measurements_belong_to_the_candidate_whichever_of_its_trials_was_measured(storage):
    builder = StudyBuilder(storage).predict(1).measure_finalists(1).measure(1)
    look, measured = view_study(storage, "s").trials
    assert look.number == 0
    assert measured.number == 1
    assert measured.held_out == look.held_out is not None
    [best] = describe_study(storage, "s", 1)["best"]
    assert (best["number"], best["held_out_speedup"]) == (1, measured.held_out.value)
    assert builder.study.trials[1].params == builder.study.trials[0].params


def test_studies_of_others_and_of_newer_versions_are_refused(storage):
    optuna.create_study(study_name="other", storage=storage, direction="maximize")
    with pytest.raises(InvalidInputError, match="study 'other': was not made by this version of layerskip"):
        view_study(storage, "other")
    StudyBuilder(storage).study.set_user_attr("layerskip", {"format": 1000})
    with pytest.raises(InvalidInputError, match="study 's': was made by a newer version of layerskip"):
        view_study(storage, "s")


def test_costs_are_those_after_the_shorter_text():
    costs = costs_from(costs_of(10))
    assert costs.context == 64
    relative = costs.relative()
    # A draft step that skips nothing is a plain step.
    assert relative.draft_step(DraftParts(10, 10)) == pytest.approx(relative.plain_step) == 1


@pytest.mark.parametrize("kept", [None, "", "no JSON", "{}", "[]", json.dumps({"short": 1, "long": 2})])
def test_costs_that_were_not_kept_or_in_another_form_are_unknown(kept):
    assert costs_from(kept) is None


def test_the_speedup_of_several_prompts_is_that_of_their_total_times_within_its_interval(searched):
    for one in searched.ranked[:3]:
        records = [r for r in searched.measurements if r.prompt_set == "held-out" and r.trial == one.number]
        speedups = [speedup_of_prompt(record) for record in records]
        total = speedup_of_all(records)
        assert min(speedups) <= total.low <= total.value <= total.high <= max(speedups)
        assert total == speedup_of_all(records)  # the same every time
        single = speedup_of_all(records[:1])
        assert single.value == single.low == single.high == pytest.approx(speedups[0])
