"""What is raised when trials go wrong, and which trials a search survives."""

import optuna
import pytest
from optuna.trial import TrialState

from studies.optimizing import optimize
from studies.storage_errors import StorageError


def stop_after(count):
    def stop(study, _):
        if sum(trial.state.is_finished() for trial in study.trials) >= count:
            study.stop()

    return stop


def test_trials_run_until_a_callback_stops_them(storage):
    study = optuna.create_study(storage=storage)
    optimize(study, lambda trial: trial.suggest_float("x", 0, 1), callbacks=[stop_after(3)])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3


def test_no_trial_starts_when_the_time_is_up(storage):
    study = optuna.create_study(storage=storage)
    optimize(study, lambda trial: 1.0, timeout=1e-9)
    assert study.trials == []
    optimize(study, lambda trial: 1.0, timeout=0.5)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


def test_an_objectives_own_error_is_raised_as_it_is(storage):
    study = optuna.create_study(storage=storage)

    def broken(trial):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match=r"^a bug$"):
        optimize(study, broken)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_an_objectives_own_error_is_raised_though_its_trial_was_taken_for_dead(storage):
    study = optuna.create_study(storage=storage)

    def broken(trial):
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"^a bug$"):
        optimize(study, broken, callbacks=[stop_after(2)])
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_a_pruned_trial_that_was_taken_for_dead_is_given_up(storage):
    study = optuna.create_study(storage=storage)

    def objective(trial):
        if trial.number == 0:
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        raise optuna.TrialPruned

    optimize(study, objective, callbacks=[stop_after(2)])
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.PRUNED]


def test_a_callbacks_error_is_not_taken_for_the_trials(storage):
    study = optuna.create_study(storage=storage)

    def broken(study, trial):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match=r"^a bug$"):  # without a value, the trial has failed as one taken for dead has
        optimize(study, lambda trial: float("nan"), callbacks=[stop_after(2), broken])
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


@pytest.mark.parametrize("notices_in_the_objective", [True, False])
def test_a_trial_that_was_taken_for_dead_is_given_up_and_the_next_begins(storage, notices_in_the_objective):
    study = optuna.create_study(storage=storage)

    def objective(trial):
        if trial.number == 0:  # as another worker does when this one has been asleep
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            if notices_in_the_objective:
                trial.set_user_attr("key", "value")
        return 1.0

    optimize(study, objective, callbacks=[stop_after(3)])
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]


@pytest.mark.parametrize("notices_in_the_objective", [True, False])
def test_a_trial_that_another_worker_took_too_and_finished_first_keeps_its_value(storage, notices_in_the_objective):
    study = optuna.create_study(storage=storage)

    def objective(trial):
        if trial.number == 0:
            storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [7.0])
            if notices_in_the_objective:
                trial.set_user_attr("key", "value")
        return 1.0

    optimize(study, objective, callbacks=[stop_after(3)])
    assert [trial.value for trial in study.trials] == [7.0, 1.0, 1.0]


@pytest.mark.parametrize("error", [StorageError("storage 'x': is full"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_what_goes_wrong_while_a_trial_is_stored_is_raised_as_it_is(storage, monkeypatch, error):
    study = optuna.create_study(storage=storage)

    def fails(*arguments, **options):
        raise error

    def objective(trial):
        monkeypatch.setattr(storage, "set_trial_state_values", fails)
        return 1.0

    with pytest.raises(type(error)) as caught:
        optimize(study, objective)
    assert caught.value is error
