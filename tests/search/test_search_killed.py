"""A search whose process is killed (SIGKILL) in the middle of a trial, and started again."""

import time

import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

import search.search as search_module
from studies.ranking import PREDICTION_STEP
from studies.storage import open_storage
from studies.study import load_study
from tests.processes import processes
from tests.search import killable_search
from tests.search.searches import records

# Three missed heartbeats, and as much again as the database's clock (whole seconds) may be off.
UNTIL_TAKEN_FOR_DEAD = 3 * killable_search.HEARTBEAT_SECONDS + 1.5
STARTS, TRIALS = killable_search.STARTS, killable_search.TRIALS


@pytest.fixture(autouse=True)
def search_as_it_was(monkeypatch):
    """What a killable search changes in this process is changed back."""
    monkeypatch.setattr(search_module, "measure_costs", search_module.measure_costs)
    monkeypatch.setattr(search_module, "warm_starts", search_module.warm_starts)


def kill_in_the_middle_of(doing, url, folder):
    """Search in another process, and kill it in the middle of a trial."""
    hears, says = processes.Pipe(duplex=False)
    process = processes.Process(target=killable_search.stand_still_in, args=(doing, url, str(folder), says))
    process.start()
    says.close()
    try:
        assert hears.recv() == "in the middle of a trial"
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -9
    time.sleep(UNTIL_TAKEN_FOR_DEAD)


def trials_of(url):
    return load_study(open_storage(url), killable_search.STUDY).trials


def states_of(trials):
    return [trial.state for trial in trials if trial.state != TrialState.WAITING]


def retry_of(trials, number):
    [retry] = [trial for trial in trials if RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) == number]
    return retry


def test_a_search_killed_while_it_looked_at_a_candidate_goes_on_and_looks_at_it_again(database, tmp_path):
    kill_in_the_middle_of("predicting", database, tmp_path)
    before = trials_of(database)
    assert [state.is_finished() for state in states_of(before)] == [True, True, False]

    result = killable_search.search(database, tmp_path).run()  # the lock of the killed process does not keep it waiting

    after = trials_of(database)
    assert result.trials == TRIALS
    assert after[:2] == before[:2]
    assert after[2].state == TrialState.FAIL
    retry = retry_of(after, 2)
    assert (retry.state.is_finished(), retry.params) == (True, before[2].params)
    assert PREDICTION_STEP in retry.intermediate_values
    assert result.profile.measured.prompt_set == "held-out"


def test_a_search_killed_in_the_middle_of_a_measurement_goes_on_and_tries_its_candidate_again(database, tmp_path):
    kill_in_the_middle_of("measuring", database, tmp_path)
    before = trials_of(database)
    assert states_of(before) == [TrialState.RUNNING]
    assert len(before[0].intermediate_values) == 1  # the prediction
    [first] = records(open_storage(database), killable_search.STUDY)
    assert first.trial == 0

    result = killable_search.search(database, tmp_path).run()

    after = trials_of(database)
    assert result.trials == TRIALS
    assert result.measured >= 1
    assert after[0].state == TrialState.FAIL
    retry = retry_of(after, 0)
    assert (retry.state.is_finished(), retry.params) == (True, before[0].params)
    kept = records(open_storage(database), killable_search.STUDY, trial=0)
    assert [record.id for record in kept] == [first.id]


@pytest.mark.slow
def test_a_trial_that_is_killed_twice_is_given_up(database, tmp_path):
    for _ in range(2):
        kill_in_the_middle_of("measuring", database, tmp_path)
    killed = trials_of(database)
    retried = retry_of(killed, 0).number

    result = killable_search.search(database, tmp_path).run()

    after = trials_of(database)
    assert result.trials == TRIALS
    assert after[0].state == TrialState.FAIL
    if killed[retried].state == TrialState.RUNNING:
        assert after[retried].state == TrialState.FAIL
        assert not [trial for trial in after if RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) == retried]
