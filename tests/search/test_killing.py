"""A search whose process is killed (SIGKILL) in the middle of a trial, and started again."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from studies.storage import open_storage
from studies.study import load_study
from tests.search import killable_search
from tests.search.searches import records

REPOSITORY = Path(__file__).parents[2]
# Three missed heartbeats, and as much again as the database's clock (whole seconds) may be off.
UNTIL_TAKEN_FOR_DEAD = 3 * killable_search.HEARTBEAT_SECONDS + 1.5


def kill_in_the_middle_of_a_trial(url, *, after):
    """Search in another process, and kill it when ``after`` trials are done and the next one has begun."""
    command = [sys.executable, "-m", "tests.search.killable_search", url, str(after)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said = process.stdout.readline()
        finally:
            process.kill()
        assert said == "in the middle of a trial\n", process.stderr.read()
    assert process.returncode == -9
    time.sleep(UNTIL_TAKEN_FOR_DEAD)


def trials_of(url):
    return load_study(open_storage(url), killable_search.STUDY).trials


def states_of(url):
    return [trial.state for trial in trials_of(url)]


def finished_records(url, trials):
    every = records(open_storage(url), killable_search.STUDY)
    return {(r.id, r.trial, r.prompt, r.plain_seconds, r.draft_seconds) for r in every if r.trial in trials}


def test_a_killed_search_goes_on_without_losing_a_finished_trial_and_tries_the_killed_one_again(database):
    kill_in_the_middle_of_a_trial(database, after=2)
    before = trials_of(database)
    assert states_of(database) == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
    kept = finished_records(database, {0, 1})
    assert len(kept) == 2 * 3
    assert len(finished_records(database, {2})) == 1

    result = killable_search.search(database).run()

    after = trials_of(database)
    assert result.trials == states_of(database).count(TrialState.COMPLETE) == killable_search.TRIALS
    assert after[:2] == before[:2]
    assert kept <= finished_records(database, {0, 1})
    assert after[2].state == TrialState.FAIL
    [retry] = [trial for trial in after if RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) == 2]
    assert retry.state == TrialState.COMPLETE
    assert retry.params == before[2].params
    assert result.profile.measured.prompt_set == "held-out"


@pytest.mark.slow
def test_a_trial_that_is_killed_twice_is_given_up(database):
    kill_in_the_middle_of_a_trial(database, after=1)
    kill_in_the_middle_of_a_trial(database, after=0)
    killed = trials_of(database)
    assert [trial.state for trial in killed] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING]
    assert RetryHeartbeatStaleTrialCallback.retried_trial_number(killed[2]) == 1

    result = killable_search.search(database).run()

    after = trials_of(database)
    assert result.trials == killable_search.TRIALS
    assert after[2].state == TrialState.FAIL
    assert all(trial.state == TrialState.COMPLETE for trial in after[3:])
    assert all(RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) is None for trial in after[3:])
