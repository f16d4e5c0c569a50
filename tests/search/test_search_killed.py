"""A search whose process is killed (SIGKILL) in the middle of a trial, and started again."""

import time

import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

import search.search as search_module
from search.objective import MEASURES_KEY
from studies.ranking import basis_of
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
    assert states_of(before) == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]

    result = killable_search.search(database, tmp_path).run()  # the lock of the killed process does not keep it waiting

    after = trials_of(database)
    assert result.trials == TRIALS
    assert after[:2] == before[:2]
    assert after[2].state == TrialState.FAIL
    retry = retry_of(after, 2)
    assert (retry.state, retry.params, basis_of(retry)) == (TrialState.COMPLETE, before[2].params, "predicted")
    assert result.profile.measured.prompt_set == "held-out"


def test_a_search_killed_in_the_middle_of_a_measurement_goes_on_and_measures_again(database, tmp_path):
    kill_in_the_middle_of("measuring", database, tmp_path)
    before = trials_of(database)
    assert states_of(before) == [TrialState.COMPLETE] * STARTS + [TrialState.RUNNING]
    [first] = records(open_storage(database), killable_search.STUDY)
    assert first.trial == STARTS

    result = killable_search.search(database, tmp_path).run()

    after = trials_of(database)
    assert (result.trials, after[:STARTS]) == (TRIALS, before[:STARTS])
    assert after[STARTS].state == TrialState.FAIL
    retry = retry_of(after, STARTS)
    assert (retry.state, retry.params, basis_of(retry)) == (TrialState.COMPLETE, before[STARTS].params, "measured")
    assert retry.user_attrs[MEASURES_KEY] == before[STARTS].user_attrs[MEASURES_KEY]
    kept = records(open_storage(database), killable_search.STUDY, trial=STARTS)
    assert [record.id for record in kept] == [first.id]


@pytest.mark.slow
def test_a_trial_that_is_killed_twice_is_given_up(database, tmp_path):
    for _ in range(2):
        kill_in_the_middle_of("measuring", database, tmp_path)
    killed = trials_of(database)
    assert states_of(killed) == [TrialState.COMPLETE] * STARTS + [TrialState.FAIL, TrialState.RUNNING]
    assert retry_of(killed, STARTS).number == STARTS + 1

    result = killable_search.search(database, tmp_path).run()

    after = trials_of(database)
    assert result.trials == TRIALS
    assert after[STARTS + 1].state == TrialState.FAIL
    assert all(RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) is None for trial in after[STARTS + 2 :])
