"""What a study's trials say, and the order that they put candidates in."""

import optuna
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from studies.ranking import (
    FULLY_TRACED_KEY,
    REVISITS_KEY,
    basis_of,
    best_trials,
    candidate_key,
    completed_trials,
    evaluated_trials,
    is_stopped,
    predicted_trials,
    prediction_of,
    prompt_speedups,
    speedup_of,
)

CHOICE = CategoricalDistribution(tuple("abcd"))
SPEEDUPS = st.sampled_from([0.5, 0.9, 1.0, 1.1, 2.0])
KINDS = ("measured", "predicted", "stopped", "failed")
drawn_trials = st.lists(st.tuples(st.sampled_from("abcd"), SPEEDUPS, st.sampled_from(KINDS)), max_size=10)


def trial_of(choice, speedup, kind):
    """A trial of a candidate; its prediction is its speedup where it was not measured, and otherwise 3."""
    state = {"measured": TrialState.COMPLETE, "failed": TrialState.FAIL}.get(kind, TrialState.PRUNED)
    is_measured = kind in ("measured", "stopped")
    return create_trial(
        state=state,
        value=speedup if state == TrialState.COMPLETE else None,
        params={"choice": choice},
        distributions={"choice": CHOICE},
        intermediate_values={0: 3.0, 2: speedup} if is_measured else {0: speedup},
        user_attrs={"speedup": speedup} if is_measured else {},
    )


def study_of(drawn):
    study = optuna.create_study(direction="maximize")
    for trial in drawn:
        study.add_trial(trial_of(*trial))
    return study


def test_a_trial_says_what_was_predicted_and_what_was_measured():
    trials = study_of([("a", 0.9, kind) for kind in KINDS[:3]]).trials
    assert [basis_of(trial) for trial in trials] == ["measured", "predicted", "measured"]
    assert [prediction_of(trial) for trial in trials] == [3.0, 0.9, 3.0]
    assert [prompt_speedups(trial) for trial in trials] == [{2: 0.9}, {}, {2: 0.9}]
    assert [speedup_of(trial) for trial in trials] == [0.9] * 3
    assert [is_stopped(trial) for trial in trials] == [False, False, True]


@given(drawn_trials, st.integers(1, 5))
@settings(max_examples=60)
def test_measured_candidates_are_best_then_predicted_ones_and_last_those_that_were_stopped(drawn, count):
    study = study_of(drawn)
    best = best_trials(study, count)
    order = ("measured", "predicted", "stopped")
    expected = {}
    for choice in "abcd":
        kinds = {kind for name, _, kind in drawn if name == choice}
        surest = next((kind for kind in ("measured", "stopped", "predicted") if kind in kinds), None)
        if surest is not None:
            highest = max(speedup for name, speedup, kind in drawn if (name, kind) == (choice, surest))
            expected[choice] = (order.index(surest), -highest)
    assert len({candidate_key(trial) for trial in best}) == len(best) == min(count, len(expected))
    found = [expected[trial.params["choice"]] for trial in best]
    assert found == sorted(expected.values())[:count]
    assert [-speedup for _, speedup in found] == [speedup_of(trial) for trial in best]


def test_what_was_predicted_from_some_texts_alone_comes_last():
    study = study_of([("a", 0.9, "predicted")])
    easy = trial_of("b", 2.0, "predicted")
    easy.user_attrs[FULLY_TRACED_KEY] = False
    study.add_trial(easy)
    assert [trial.params["choice"] for trial in best_trials(study, 2)] == ["a", "b"]


@given(drawn_trials)
@settings(max_examples=30)
def test_the_best_trial_is_what_optuna_calls_so(drawn):
    study = study_of(drawn)
    measured = completed_trials(study)
    assert len(measured) == sum(kind == "measured" for *_, kind in drawn)
    if measured:
        assert best_trials(study, 1)[0].value == study.best_value


@given(drawn_trials)
@settings(max_examples=30)
def test_every_finished_trial_was_evaluated_but_those_that_measure_a_candidate_evaluated_earlier(drawn):
    study = study_of(drawn)
    finished = sum(kind != "failed" for *_, kind in drawn)
    again = trial_of("a", 1.0, "measured")
    again.user_attrs[REVISITS_KEY] = 0
    study.add_trial(again)
    study.add_trial(create_trial(state=TrialState.PRUNED))  # would have skipped everything
    assert len(evaluated_trials(study)) == finished
    assert len(predicted_trials(study)) == finished + 1
