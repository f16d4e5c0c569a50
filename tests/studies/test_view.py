"""A study as its pictures need it."""

import json
import math
import random
from datetime import timedelta

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip import SkipSet
from layerskip.errors import InvalidInputError
from studies.damage import LEAST_CANDIDATES, learned_acceptance
from studies.ranking import best_trials
from studies.statistics import Speedup, speedup_of_all, speedup_of_prompt
from studies.step_costs import read_parts
from studies.study import describe_study
from studies.view import TrialSummary, view_study
from tests.studies.drawn_studies import BEGAN, StudyInTheMaking, latency_of


def test_what_trials_tried_is_read_from_their_parameters(searched_storage, searched):
    study = optuna.load_study(study_name="s", storage=searched_storage)
    for one, trial in zip(searched.trials, study.trials, strict=True):
        assert str(one.skip_set) == trial.user_attrs["skip_set"]
        assert one.vocabulary == trial.params["vocabulary"]
        assert one.acceptance == trial.user_attrs["acceptance"]
        assert one.basis == trial.user_attrs["basis"]
    assert len(searched.evaluated) == 25
    assert len(searched.measured) == 5
    assert searched.states == {"complete": 30}
    assert (searched.began, searched.ended) == (BEGAN, BEGAN + timedelta(seconds=30))


def test_finalists_come_first_and_then_the_best_as_the_study_ranks_them(searched_storage, searched):
    study = optuna.load_study(study_name="s", storage=searched_storage)
    ranked = [trial.number for trial in best_trials(study, 1000)]
    finals = [one for one in searched.ranked if one.held_out]
    assert len(finals) == 3
    assert list(searched.ranked[:3]) == sorted(finals, key=lambda one: one.held_out.value, reverse=True)
    assert [one.number for one in searched.ranked[3:]] == [n for n in ranked if n not in {one.number for one in finals}]


def test_a_candidate_keeps_what_it_was_looked_at_with_where_it_is_measured(storage):
    making = StudyInTheMaking(storage).looked_at(3)
    cost = making.study.trials[0].user_attrs["draft_cost"]
    told = {k: v for k, v in making.study.trials[0].user_attrs.items() if k != "draft_cost"}
    trial = making.study.trials[0]
    making.study.add_trial(
        optuna.trial.create_trial(
            value=1.0,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=told | {"basis": "measured"},
        )
    )
    [measured] = view_study(storage, "s").measured
    assert measured.draft_cost == cost


def test_held_out_measurements_belong_to_the_candidate_whichever_of_its_trials_made_them(storage):
    making = StudyInTheMaking(storage).looked_at(1).finalists(1).measured(1)
    look, measured = view_study(storage, "s").trials
    assert look.number == 0
    assert measured.number == 1
    assert measured.held_out == look.held_out is not None
    [best] = describe_study(storage, "s", 1)["best"]
    assert (best["number"], best["held_out_speedup"]) == (1, measured.held_out.value)
    assert making.study.trials[1].params == making.study.trials[0].params


def test_studies_of_others_and_of_newer_versions_are_refused(storage):
    optuna.create_study(study_name="other", storage=storage, direction="maximize")
    with pytest.raises(InvalidInputError, match="study 'other': was not made by this version of layerskip"):
        view_study(storage, "other")
    StudyInTheMaking(storage).study.set_user_attr("layerskip", {"format": 1000})
    with pytest.raises(InvalidInputError, match="study 's': was made by a newer version of layerskip"):
        view_study(storage, "s")


def test_costs_are_in_units_of_a_plain_step_halfway_between_the_lengths_measured():
    parts = read_parts(latency_of(10))
    assert parts.context == (64 + 512) / 2
    assert parts.verifying(1) == pytest.approx(1)
    whole = parts.fixed + 10 * (parts.attention + parts.mlp) + parts.head[0]
    assert whole == pytest.approx(1)  # a draft step that leaves nothing out is a plain step


@given(st.integers(1, 20))
def test_a_pass_costs_what_the_cheapest_measured_width_with_room_costs(tokens):
    parts = read_parts(latency_of(10))
    widths = [width for width in (1, 2, 4, 8, 12) if width >= tokens] or [12]
    assert parts.verifying(tokens) == min(parts.verification[width] for width in widths)


@pytest.mark.parametrize("kept", [None, "", "no JSON", "{}", "[]", json.dumps({"short": 1, "long": 2})])
def test_costs_that_were_not_kept_or_in_another_form_are_unknown(kept):
    assert read_parts(kept) is None


DAMAGES = [1.5, 1.0, *[0.05] * 6]  # of each sublayer, in −ln α


def looks(damages, count, *, share=0.3, never=()):
    """Looks at random candidates of a model to whose sublayers damages add up."""
    source = random.Random(0)
    for number in range(count):
        mask = [i not in never and source.random() < share for i in range(len(damages))]
        skip_set = SkipSet.from_mask([*mask[:-1], False])
        rate = math.exp(-sum(damage for damage, skip in zip(damages, skip_set.mask, strict=True) if skip))
        told = {"predicted": 1.0, "draft_cost": None, "bridged": False, "vocabulary": 0, "draft": "", "source": ""}
        yield TrialSummary(
            number,
            str(number),
            "predicted",
            Speedup(1, 1, 1),
            acceptance=rate,
            skip_set=skip_set,
            stopped=False,
            **told,
        )


def test_a_needed_sublayer_is_found_out_from_candidates_that_leave_out_many():
    learned = learned_acceptance(list(looks(DAMAGES, 80)))
    assert set(learned) == set(range(7))  # the last is always kept
    for i in (0, 1):
        assert learned[i].value < 0.6
        assert learned[i].high < min(learned[other].low for other in range(2, 7))
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in learned.values())


def test_sublayers_that_do_the_same_are_learned_to_do_the_same():
    learned = learned_acceptance(list(looks([0.05] * 8, 80)))
    assert all(one.value == pytest.approx(math.exp(-0.05), abs=0.02) for one in learned.values())


def test_nothing_is_learned_from_few_candidates_or_of_sublayers_that_were_never_left_out():
    assert learned_acceptance(list(looks(DAMAGES, LEAST_CANDIDATES - 1))) == {}
    assert set(learned_acceptance(list(looks(DAMAGES, LEAST_CANDIDATES, never=(2, 3))))) <= {0, 1, 4, 5, 6}


def test_the_speedup_of_several_prompts_is_that_of_their_total_times_within_its_interval(searched):
    for one in searched.ranked[:3]:
        records = [r for r in searched.measurements if r.prompt_set == "held-out" and r.trial == one.number]
        speedups = [speedup_of_prompt(record) for record in records]
        total = speedup_of_all(records)
        assert min(speedups) <= total.low <= total.value <= total.high <= max(speedups)
        assert total == speedup_of_all(records)  # the same every time
        single = speedup_of_all(records[:1])
        assert single.value == single.low == single.high == pytest.approx(speedups[0])
