"""Which candidates are measured, and when a measurement is given up."""

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from search.pruner import (
    SECONDS_KEY,
    MeasuringPruner,
    enqueue_to_measure,
    hopeless,
    next_to_measure,
)
from studies.ranking import FULLY_TRACED_KEY, REVISITS_KEY, SOURCE_KEY, basis_of, predicted_trials, prediction_of

NUMBER = IntDistribution(0, 1000)


def study_of(*trials):
    """A study of candidates 0, 1, … by their predictions, or by (prediction, measured speedup of all prompts)."""
    study = optuna.create_study(direction="maximize")
    for number, trial in enumerate(trials):
        predicted, *measured = trial if isinstance(trial, tuple) else (trial,)
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if measured else TrialState.PRUNED,
                value=measured[0] if measured else None,
                params={"candidate": number},
                distributions={"candidate": NUMBER},
                intermediate_values={0: predicted, **{step: measured[0] for step in (1, 2) if measured}},
                user_attrs={FULLY_TRACED_KEY: True} | ({SECONDS_KEY: 10.0} if measured else {}),
            )
        )
    return study


def running(study, prediction, prompts=(), *, candidate=1000):
    """A running trial, as the pruner gets it."""
    study.enqueue_trial({"candidate": candidate})
    trial = study.ask()
    trial.suggest_int("candidate", 0, 1000)
    trial.set_user_attr(FULLY_TRACED_KEY, True)
    trial.report(prediction, 0)
    for step, speedup in enumerate(prompts, start=1):
        trial.report(speedup, step)
    return study.get_trials(states=(TrialState.RUNNING,))[-1]


PRUNES, MEASURES = True, False
ALWAYS = MeasuringPruner(share=1.0, seconds=1.0, trials=99, earlier=range(99))


@pytest.mark.parametrize(
    ("trials", "prediction", "verdict"),
    [
        ((), 0.5, MEASURES),  # there is nothing better
        ((0.9,), 0.8, PRUNES),  # the other is to be measured first
        ((0.9,), 0.95, MEASURES),
        (((1.1, 1.0),), 1.0, MEASURES),  # near the best measured one, though below it
        (((1.1, 1.0),), 0.9, PRUNES),  # too far below
        (((1.1, 1.0), 1.2), 1.15, PRUNES),
    ],
)
def test_a_trial_is_measured_if_its_prediction_is_the_highest_and_near_the_best_measured(trials, prediction, verdict):
    study = study_of(*trials)
    assert ALWAYS.prune(study, running(study, prediction)) == verdict


def test_without_time_for_it_nothing_is_measured():
    study = study_of((1.0, 1.0))
    assert MeasuringPruner(share=0.0, seconds=1.0, trials=99).prune(study, running(study, 2.0))
    assert MeasuringPruner(share=0.3, seconds=1.0, trials=99).prune(
        study, running(study, 2.0)
    )  # the other one took 10 s
    earlier = MeasuringPruner(share=1.0, seconds=1.0, trials=99, earlier=[0])
    assert not earlier.prune(study, running(study, 2.0))


def test_a_candidate_that_was_not_traced_on_all_texts_is_not_measured():
    study = study_of(0.5)
    trial = running(study, 2.0)
    trial.user_attrs[FULLY_TRACED_KEY] = False
    assert next_to_measure(study, trial).number == 0


@given(st.lists(st.floats(0.5, 1.5) | st.tuples(st.floats(0.5, 1.5), st.floats(0.5, 1.5)), max_size=6))
@settings(max_examples=40)
def test_the_next_to_measure_was_not_measured_and_is_predicted_to_be_fastest(trials):
    study = study_of(*trials)
    unmeasured = [trial for trial in predicted_trials(study) if basis_of(trial) == "predicted"]
    best = next_to_measure(study)
    if best is not None:
        assert prediction_of(best) == max(map(prediction_of, unmeasured))
    elif unmeasured:  # all are far from the best measured one
        assert max(map(prediction_of, unmeasured)) < prediction_of(study.best_trial)


def test_a_promising_candidate_that_was_pruned_is_enqueued_once_and_measured_by_a_trial_of_its_own():
    study = study_of(0.9, 1.2, 1.1)
    ALWAYS.revisit(study)
    ALWAYS.revisit(study)  # it waits
    [waiting] = study.get_trials(states=(TrialState.WAITING,))
    assert waiting.system_attrs["fixed_params"] == {"candidate": 1}
    assert waiting.user_attrs == {REVISITS_KEY: 1, SOURCE_KEY: "trial 1, to be measured"}


def test_nothing_is_enqueued_while_a_measurement_is_under_way_or_without_time():
    study = study_of(1.2)
    MeasuringPruner(share=0.0, seconds=1.0, trials=99).revisit(study)
    assert len(study.trials) == 1
    enqueue_to_measure(study, study.trials[0])
    study.ask()
    ALWAYS.revisit(study)
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED, TrialState.RUNNING]


def test_a_measurement_goes_on_until_it_is_clearly_slower_than_the_best_one():
    study = study_of((1.0, 1.0))
    assert not ALWAYS.prune(study, running(study, 1.0, [0.9, 0.9]))
    best, slower = dict.fromkeys(range(1, 9), 1.0), dict.fromkeys(range(1, 9), 0.9)
    assert hopeless(slower, best)
    assert not hopeless(best, best)
    assert not hopeless(best, slower)
    assert not hopeless({1: 0.9}, best)
    assert not hopeless(slower, {})


def test_at_the_end_the_best_others_are_measured_however_far_they_are():
    study = study_of((1.5, 1.5), 0.9, 0.8)
    MeasuringPruner(share=1.0, seconds=1.0, trials=4).revisit(study)
    assert not study.get_trials(states=(TrialState.WAITING,))
    pruner = MeasuringPruner(share=1.0, seconds=1.0, trials=3, earlier=range(3))
    pruner.revisit(study)
    [waiting] = study.get_trials(states=(TrialState.WAITING,))
    assert waiting.user_attrs[REVISITS_KEY] == 1
    trial = study.ask()
    trial.suggest_int("candidate", 0, 1000)
    trial.set_user_attr(FULLY_TRACED_KEY, True)
    trial.report(0.9, 0)
    assert pruner.prune(study, study.get_trials(states=(TrialState.RUNNING,))[-1]) == MEASURES


def test_what_was_given_up_early_is_measured_too_where_nothing_else_is_left():
    study = study_of((1.5, 1.5))
    given_up = create_trial(
        state=TrialState.PRUNED,
        params={"candidate": 7},
        distributions={"candidate": NUMBER},
        intermediate_values={0: 1.1},
        user_attrs={FULLY_TRACED_KEY: False},
    )
    study.add_trial(given_up)
    MeasuringPruner(share=1.0, seconds=1.0, trials=2, earlier=range(2)).revisit(study)
    [waiting] = study.get_trials(states=(TrialState.WAITING,))
    assert waiting.user_attrs[REVISITS_KEY] == 1


def test_enough_measured_candidates_are_enough():
    study = study_of(*[(1.5, 1.5)] * 8, 0.9)
    MeasuringPruner(share=1.0, seconds=1.0, trials=3, earlier=range(9)).revisit(study)
    assert not study.get_trials(states=(TrialState.WAITING,))
