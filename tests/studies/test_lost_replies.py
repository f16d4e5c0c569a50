"""Commits that a server did, and whose reply was lost with the connection: they are not done twice."""

import optuna
import pytest
from optuna.trial import TrialState

from studies.storage import open_storage
from studies.trial_loop import run_trials
from tests.studies.cutting import wire
from tests.studies.worker import measurement


@pytest.fixture
def cut(postgresql):
    with wire(postgresql.port) as cut:
        yield cut


@pytest.fixture(params=["psycopg", "psycopg2"])
def storage(request, postgresql, postgresql_url, cut):
    pytest.importorskip(request.param)
    url = postgresql_url.replace(f":{postgresql.port}/", f":{cut.port}/").replace("+psycopg:", f"+{request.param}:")
    return open_storage(url, heartbeat_seconds=1)


@pytest.fixture
def study(storage):
    return optuna.create_study(study_name="s", storage=storage)


def test_a_study_is_created_once_and_not_refused_as_a_duplicate(cut, storage):
    cut.arm(b"INSERT INTO studies")
    study = optuna.create_study(study_name="s", storage=storage)
    assert cut.cuts == 1
    assert storage.get_study_id_from_name("s") == study._study_id
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        optuna.create_study(study_name="s", storage=storage)


def test_a_finished_trial_is_finished_once(cut, study):
    trial = study.ask()
    cut.arm()
    study.tell(trial, 0.5)
    assert cut.cuts == 1
    assert [(trial.state, trial.value) for trial in study.trials] == [(TrialState.COMPLETE, 0.5)]


def test_a_trial_that_another_worker_finished_is_refused(cut, storage, study):
    trial = study.ask()
    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.5])
    assert cut.cuts == 0


def test_a_measurement_is_kept_once(cut, storage, study):
    cut.arm()
    storage.records.add(measurement("s", 0, 0.123))
    assert cut.cuts == 1
    assert len(storage.records.of("s")) == 1
    storage.records.add(measurement("s", 0, 0.123))  # not again, but another one
    assert len(storage.records.of("s")) == 2


def test_what_a_trial_chose_and_noted_is_kept(cut, study):
    trial = study.ask()
    cut.arm()
    x = trial.suggest_float("x", 0, 1)
    cut.arm()
    trial.set_user_attr("key", "value")
    cut.arm()
    trial.report(0.25, step=3)
    assert cut.cuts == 3
    [kept] = study.trials
    assert (kept.params, kept.user_attrs, kept.intermediate_values) == ({"x": x}, {"key": "value"}, {3: 0.25})


@pytest.mark.slow
def test_a_queued_trial_whose_claim_was_lost_is_queued_again(cut, storage, study):
    """Nobody knows that it is theirs; it never says that it lives, so it is taken for dead and tried again."""
    study.enqueue_trial({"x": 0.25})
    cut.arm(b"UPDATE trials SET state")

    def objective(trial):
        return trial.suggest_float("x", 0, 1)

    for trial in run_trials(study, objective, storage.heartbeats, timeout=60):
        if trial.params == {"x": 0.25}:
            break
    assert cut.cuts == 1
    assert study.trials[0].state == TrialState.FAIL
    assert [trial.state for trial in study.trials if trial.params == {"x": 0.25}] == [TrialState.COMPLETE]
