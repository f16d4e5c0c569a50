"""What is raised when trials go wrong, and which trials a search survives."""

from itertools import islice

import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from studies.heartbeats import Heartbeats
from studies.storage_errors import StorageError
from studies.trial_loop import run_trials


def run(study, storage, objective, count):
    """Run a few trials, and return those that were finished here."""
    return list(islice(run_trials(study, objective, storage.heartbeats), count))


def test_trials_run_until_the_caller_takes_no_more(storage):
    study = optuna.create_study(storage=storage)
    finished = run(study, storage, lambda trial: trial.suggest_float("x", 0, 1), 3)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert finished == study.trials


def test_no_trial_starts_when_the_time_is_up(storage):
    study = optuna.create_study(storage=storage)
    assert list(run_trials(study, lambda trial: 1.0, storage.heartbeats, timeout=0)) == study.trials == []
    finished = list(run_trials(study, lambda trial: 1.0, storage.heartbeats, timeout=0.5))
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert finished == study.trials


def test_an_objectives_own_error_is_raised_as_it_is(storage):
    study = optuna.create_study(storage=storage)

    def broken(trial):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match=r"^a bug$"):
        run(study, storage, broken, 1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_an_objectives_own_error_is_raised_though_its_trial_was_taken_for_dead(storage):
    study = optuna.create_study(storage=storage)

    def broken(trial):
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"^a bug$"):
        run(study, storage, broken, 2)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_a_pruned_trial_that_was_taken_for_dead_is_given_up(storage):
    study = optuna.create_study(storage=storage)

    def objective(trial):
        if trial.number == 0:
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        raise optuna.TrialPruned

    [finished] = run(study, storage, objective, 1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.PRUNED]
    assert finished.number == 1


@pytest.mark.filterwarnings("ignore:The value nan")
def test_a_trial_without_a_value_fails_and_the_next_begins(storage):
    study = optuna.create_study(storage=storage)
    finished = run(study, storage, lambda trial: float("nan") if trial.number == 0 else 1.0, 2)
    assert [trial.state for trial in finished] == [TrialState.FAIL, TrialState.COMPLETE]


@pytest.mark.parametrize("notices_in_the_objective", [True, False])
def test_a_trial_that_was_taken_for_dead_is_given_up_and_the_next_begins(storage, notices_in_the_objective):
    study = optuna.create_study(storage=storage)

    def objective(trial):
        if trial.number == 0:  # as another worker does when this one has been asleep
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            if notices_in_the_objective:
                trial.set_user_attr("key", "value")
        return 1.0

    finished = run(study, storage, objective, 2)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert [trial.number for trial in finished] == [1, 2]


@pytest.mark.parametrize("notices_in_the_objective", [True, False])
def test_a_trial_that_another_worker_took_too_and_finished_first_keeps_its_value(storage, notices_in_the_objective):
    study = optuna.create_study(storage=storage)

    def objective(trial):
        if trial.number == 0:
            storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [7.0])
            if notices_in_the_objective:
                trial.set_user_attr("key", "value")
        return 1.0

    run(study, storage, objective, 2)
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
        run(study, storage, objective, 1)
    assert caught.value is error


def test_ctrl_c_is_raised_though_storing_something_because_of_it_fails(storage):
    study = optuna.create_study(storage=storage)

    def objective(trial):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise StorageError("storage 'x': is full")  # noqa: B904 - as where the handler itself fails

    with pytest.raises(KeyboardInterrupt):
        run(study, storage, objective, 1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_of_workers_that_find_a_trial_dead_at_the_same_moment_one_queues_it_again(storage, monkeypatch):
    """Both may be told that theirs was the failure, where a write is repeated after a lost connection."""
    study = optuna.create_study(storage=storage)
    study.ask()
    storage.heartbeats.record(study.study_name, 0)
    tell = optuna.Study.tell

    def tell_unchecked(self, trial, values=None, state=None, **named):
        if state == TrialState.FAIL:
            return self.get_trials(deepcopy=False)[trial]
        return tell(self, trial, values, state, **named)

    monkeypatch.setattr(optuna.Study, "tell", tell_unchecked)
    monkeypatch.setattr(Heartbeats, "stale_trials", lambda self, study: [0])
    for _ in range(2):
        run(study, storage, lambda trial: 1.0, 1)
    retried = [RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) for trial in study.trials]
    assert retried.count(0) == 1


def test_a_dead_trial_whose_claimant_died_too_is_found_again(storage):
    study = optuna.create_study(storage=storage)
    study.ask()
    storage.heartbeats.record(study.study_name, 0)
    assert storage.heartbeats.claim(study.study_name, 0)
    assert not storage.heartbeats.claim(study.study_name, 0)
    storage.heartbeats.silent_trials(study)  # gives it a heartbeat
    assert storage.heartbeats.claim(study.study_name, 0)
