"""Full disks, closed folders, databases of another time, and clocks that jump: an error in one line, or no matter."""

from datetime import datetime, timedelta

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState
from sqlalchemy import event

from layerskip.errors import InvalidInputError
from studies.storage import open_existing_storage, open_storage
from studies.storage_errors import StorageError
from studies.study import StudyContext, describe_study, list_studies, open_study
from studies.trial_loop import run_trials
from tests.studies.worker import measurement
from tests.unprivileged import closed

CONTEXT = StudyContext("makers/model", "0123", "float32", "a processor", "4567", 48, 6, {"num_layers": 4})
CONTEXT_KEY = "layerskip"


def execute(storage, statement, **values):
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement), values)


def fill_disk(storage):
    """Let a SQLite database grow by nothing more, as on a full disk."""

    def full(connection, _):
        [pages] = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(storage.engine, "connect", full)
    storage.engine.dispose()


def test_a_full_disk_is_an_error_in_one_line_and_what_was_finished_stays(database):
    storage = open_storage(database)
    study = open_study(storage, "s", CONTEXT)

    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 3:
            fill_disk(storage)
        for prompt in range(3):
            storage.records.add(measurement("s", trial.number, float(prompt)))
            trial.set_user_attr(f"notes {prompt}", "x" * 20_000)
        return x

    with pytest.raises(StorageError) as caught:
        list(run_trials(study, objective, storage.heartbeats))
    assert str(caught.value) == f"storage '{database}': database or disk is full"

    # With room again, the study goes on.
    storage = open_storage(database)
    study = open_study(storage, "s", CONTEXT)
    assert [trial.number for trial in study.get_trials(states=(TrialState.COMPLETE,))] == [0, 1, 2]
    assert {0, 1, 2} <= {record.trial for record in storage.records.of("s")}
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 4


def test_a_measurement_that_does_not_fit_on_the_disk_is_an_error_in_one_line(database):
    storage = open_storage(database)
    fill_disk(storage)
    kept = 0

    def fill():
        nonlocal kept
        while True:
            storage.records.add(measurement("s" * 500, kept, 1.0))
            kept += 1

    with pytest.raises(StorageError, match=r"^storage 'sqlite:///.*': database or disk is full$"):
        fill()
    assert len(open_storage(database).records.of("s" * 500)) == kept


@pytest.mark.parametrize("opener", [open_storage, open_existing_storage])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_may_not_be_written_is_an_error_in_one_line(public_folder, opener, there):
    url = f"sqlite:///{public_folder}/studies.db"
    if there:
        optuna.create_study(study_name="s", storage=open_storage(url))
    with closed(public_folder), pytest.raises(StorageError) as caught:
        optuna.create_study(study_name="new", storage=opener(url))  # one that is there may be opened, and read
    assert str(caught.value).startswith(f"storage '{url}': ")
    assert "\n" not in str(caught.value)
    if there:
        assert optuna.get_all_study_names(open_storage(url)) == ["s"]


def with_format(database, format):
    storage = open_storage(database)
    study = open_study(storage, "s", CONTEXT)
    study.set_user_attr(CONTEXT_KEY, {"format": format, "model": "makers/model", "unheard of": 1})
    return storage


def test_a_study_of_a_newer_version_is_refused_as_newer(database):
    storage = with_format(database, 1000)
    with pytest.raises(InvalidInputError) as caught:
        open_study(storage, "s", CONTEXT)
    assert str(caught.value) == (
        "study 's': was made by a newer version of layerskip; update layerskip, or choose another name with --study"
    )
    with pytest.raises(InvalidInputError) as caught:
        describe_study(storage, "s", 1)
    assert str(caught.value) == "study 's': was made by a newer version of layerskip; update layerskip"
    assert [summary.name for summary in list_studies(storage)] == ["s"]


@pytest.mark.parametrize("format", [0, None, "two"])
def test_a_study_of_an_unknown_version_is_not_refused_as_newer(database, format):
    with pytest.raises(InvalidInputError, match="was not made by this version of layerskip"):
        open_study(with_format(database, format), "s", CONTEXT)


def test_a_database_of_a_newer_optuna_is_an_error_in_one_line(database):
    execute(open_storage(database), "UPDATE alembic_version SET version_num = 'v99.0.0'")
    for opener in (open_storage, open_existing_storage):
        with pytest.raises(StorageError) as caught:
            opener(database)
        assert str(caught.value).startswith(f"storage '{database}': The runtime optuna version ")
        assert "updating optuna" in str(caught.value)
        assert "\n" not in str(caught.value)


def measured(trial):
    """An objective that predicts, and measures one prompt."""
    trial.report(1.0, 0)
    trial.report(0.9, 1)
    return trial.suggest_float("x", 0, 1)


def test_a_study_with_trials_from_the_future_is_listed_and_resumed(database):
    storage = open_storage(database)
    study = open_study(storage, "s", CONTEXT)
    study.optimize(measured, n_trials=2)
    storage.records.add(measurement("s", 0, 1.0))
    future = datetime.now() + timedelta(days=3650)
    execute(storage, "UPDATE trials SET datetime_start = :then, datetime_complete = :then", then=future)
    execute(storage, "UPDATE layerskip_prompt_measurements SET measured_at = :then", then=future)

    storage = open_storage(database)
    study = open_study(storage, "s", CONTEXT)
    [summary] = list_studies(storage)
    assert (summary.trials, summary.measured) == (2, 2)
    assert describe_study(storage, "s", 5)["measurements"] == 1
    study.optimize(measured, n_trials=1)
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 3


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_jumps_costs_no_living_trial(database, hours):
    storage = open_storage(database, heartbeat_seconds=1)
    study = open_study(storage, "s", CONTEXT)
    living = study.ask()
    storage.heartbeats.record("s", living.number)
    # The clock jumps the one way, which is the heartbeat's jumping the other.
    execute(storage, 'UPDATE layerskip_heartbeats SET "at" = datetime("at", :jump)', jump=f"{-hours} hours")
    assert storage.heartbeats.silent_trials(study) == ({living.number} if hours > 0 else set())
    with storage.heartbeats.beating("s", living.number):
        next(run_trials(study, lambda trial: 1.0, storage.heartbeats))
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.COMPLETE]
