"""Opening a study's database, and what is said when that fails."""

import os
import sqlite3
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import optuna
import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from layerskip.errors import LayerSkipError, MissingDependencyError
from studies.storage import StorageError, check_storage, is_there, open_existing_storage, open_storage, redacted

OPENERS = [open_storage, open_existing_storage]
PASSWORD = "s3cr3t-pw"


def error_of(opener, url):
    """The message of an error that a user can act on: one line that does not hold the password."""
    with pytest.raises(LayerSkipError) as caught:
        opener(url)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("storage '")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    return message


def without_driver(*packages):
    """The first of some database drivers that is not installed here."""
    return next(name for name in packages if find_spec(name) is None)


def test_a_sqlite_file_is_made_and_used_in_write_ahead_mode(database, tmp_path):
    storage = open_storage(database)
    with storage.engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar() == 1  # NORMAL
    with sqlite3.connect(tmp_path / "studies.db") as other:  # the mode is kept in the file
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_every_connection_of_a_storage_is_in_write_ahead_mode(storage):
    connections = [storage.engine.connect() for _ in range(3)]
    try:
        found = [connection.execute(sqlalchemy.text("PRAGMA synchronous")).scalar() for connection in connections]
    finally:
        for connection in connections:
            connection.close()
    assert found == [1, 1, 1]


def test_a_storage_keeps_studies_for_whoever_opens_it_next(database):
    optuna.create_study(study_name="kept", storage=open_storage(database))
    assert optuna.get_all_study_names(open_storage(database)) == ["kept"]
    assert optuna.get_all_study_names(open_existing_storage(database)) == ["kept"]


def test_a_running_trial_is_taken_for_dead_after_three_missed_heartbeats(database):
    storage = open_storage(database, heartbeat_seconds=7)
    study = optuna.create_study(study_name="s", storage=storage)
    trials = [study.ask() for _ in range(2)]
    for trial, seconds in zip(trials, (20, 23), strict=True):
        storage.heartbeats.record("s", trial.number)
        with storage.engine.begin() as connection:
            earlier = "UPDATE layerskip_heartbeats SET \"at\" = datetime('now', :ago) WHERE trial = :trial"
            connection.execute(sqlalchemy.text(earlier), {"ago": f"-{seconds} seconds", "trial": trial.number})
    assert storage.heartbeats.silent_trials(study) == {trials[1].number}


def test_opening_an_existing_storage_makes_no_file(database, tmp_path):
    message = error_of(open_existing_storage, database)
    assert message == f"storage '{database}': no such file; search first, or name another with --storage"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opener", OPENERS)
def test_a_storage_in_memory_can_be_used(opener):
    storage = opener("sqlite:///:memory:")
    optuna.create_study(study_name="s", storage=storage)
    assert optuna.get_all_study_names(storage) == ["s"]


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("url", ["", "studies.db", "not a url", f"user:{PASSWORD}@host", f"/:{PASSWORD}@host/db"])
def test_what_is_not_a_url_is_refused_as_such(opener, url):
    assert "not a database URL; expected one such as sqlite:///" in error_of(opener, url)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    "url",
    [f"journal://me:{PASSWORD}@host/db", f"redis://:{PASSWORD}@host:1/0", f"postgresql+nothing://a:{PASSWORD}@b/c"],
)
def test_an_unknown_kind_of_database_is_named_as_unknown(opener, url):
    message = error_of(opener, url)
    assert "unknown kind of database" in message
    assert ":***@" in message


@pytest.mark.parametrize("opener", OPENERS)
def test_a_port_that_is_no_number_is_an_error_in_one_line(opener):
    error_of(opener, f"postgresql://me:{PASSWORD}@host:port/db")


@pytest.mark.parametrize("opener", OPENERS)
def test_a_sqlite_url_with_a_host_is_an_error_in_one_line(opener):
    error_of(opener, f"sqlite://me:{PASSWORD}@host/studies.db")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug")], ids=repr)
def test_a_bug_is_not_reported_as_an_error_of_the_storage(database, monkeypatch, error):
    def broken(engine):
        raise error

    monkeypatch.setattr("studies.storage.Table.metadata.create_all", broken)
    with pytest.raises(type(error), match=r"^a bug$"):
        open_storage(database)


@pytest.mark.parametrize("opener", OPENERS)
def test_a_file_that_is_not_a_database_is_refused_and_left_alone(opener, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("shopping list\n" * 100)
    assert error_of(opener, f"sqlite:///{file}") == f"storage 'sqlite:///{file}': file is not a database"
    assert file.read_text() == "shopping list\n" * 100


@pytest.mark.parametrize(
    "option", ["password", "sslpassword", "PassWd", "password1", "odbc_connect", "oauth_client_secret", "unheard_of"]
)
def test_what_may_be_secret_among_a_urls_options_is_starred_out(option):
    assert redacted(f"postgresql://me@host/db?{option}={PASSWORD}") == f"postgresql://me@host/db?{option}=***"
    twice = redacted(f"postgresql://me@host/db?{option}={PASSWORD}&{option}={PASSWORD}")
    assert twice == f"postgresql://me@host/db?{option}=***"


def test_what_is_not_secret_among_a_urls_options_is_shown():
    url = "postgresql://me@host/db?connect_timeout=3&host=other&sslmode=require"
    assert redacted(url) == url


def test_a_missing_folder_is_an_error_in_one_line(tmp_path):
    url = f"sqlite:///{tmp_path}/no/such/folder/studies.db"
    assert error_of(open_storage, url) == f"storage '{url}': unable to open database file"
    assert list(tmp_path.iterdir()) == []


def test_a_path_below_a_file_is_an_error_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    url = f"sqlite:///{tmp_path}/file/studies.db"
    assert error_of(open_storage, url) == f"storage '{url}': unable to open database file"


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("kind", ["mysql", "postgresql"])
def test_a_missing_driver_is_named(opener, kind):
    drivers = {"mysql": ("pymysql", "cymysql"), "postgresql": ("pg8000", "asyncpg", "psycopg2cffi")}
    driver = without_driver(*drivers[kind])
    url = f"{kind}+{driver}://me:{PASSWORD}@localhost/studies"
    message = error_of(opener, url)
    with pytest.raises(MissingDependencyError):
        opener(url)
    assert "driver is not installed" in message
    assert f"{kind}+{driver}://me:***@localhost/studies" in message
    assert "None" not in message


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1).map(lambda text: f"<{text}>"))
def test_a_password_is_starred_out_wherever_a_url_is_shown(password):
    url = sqlalchemy.URL.create("postgresql", "me", password, "host", 5432, "db").render_as_string(hide_password=False)
    assert redacted(url) == "postgresql://me:***@host:5432/db"


@given(st.text())
def test_any_text_can_be_shown_in_place_of_a_url(text):
    assert isinstance(redacted(text), str)


@pytest.mark.parametrize("url", [f"me:{PASSWORD}@host", f"postgresql://me:{PASSWORD}@host:port/db"])
def test_a_malformed_url_is_not_shown_at_all(url):
    assert PASSWORD not in redacted(url)


def test_a_file_name_in_place_of_a_url_is_shown():
    with pytest.raises(
        StorageError, match=r"^storage 'my/demo\.db': not a database URL; expected one such as sqlite:///"
    ):
        open_storage("my/demo.db")


def test_a_storage_is_checked_before_its_file_is_made(tmp_path):
    check_storage(f"sqlite:///{tmp_path}/new.db")
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match=r"cannot create the file: no such folder: .*missing"):
        check_storage(f"sqlite:///{tmp_path}/missing/new.db")
    (tmp_path / "text.db").write_text("not a database")
    with pytest.raises(StorageError, match="file is not a database"):
        check_storage(f"sqlite:///{tmp_path}/text.db")


def test_a_storage_error_can_be_caught_like_every_other_error_of_layerskip():
    assert issubclass(StorageError, LayerSkipError)


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A database with a study, which this user may only read."""
    study = optuna.create_study(study_name="kept", storage=open_storage(f"sqlite:///{tmp_path}/kept.db"))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    study._storage.engine.dispose()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    return f"sqlite:///{tmp_path}/kept.db"


def test_a_file_that_may_only_be_read_is_read_and_left_alone(read_only, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    storage = open_existing_storage(read_only)
    assert storage.is_read_only
    assert len(optuna.load_study(study_name="kept", storage=storage).trials) == 2
    assert storage.records.of("kept") == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(StorageError, match=r"readonly|read-only"):
        optuna.create_study(study_name="new", storage=storage)


@pytest.mark.parametrize("options", ["uri=true", "uri=true&timeout=5", "mode=rwc&uri=true"])
def test_a_file_is_found_by_a_uri_as_well(tmp_path, options):
    url = f"sqlite:///file:{tmp_path}/u.db?{options}"
    assert not is_there(url)
    optuna.create_study(study_name="s", storage=open_storage(url))
    assert is_there(url)
    assert [s.study_name for s in optuna.get_all_study_summaries(open_existing_storage(url))] == ["s"]
    assert is_there("sqlite:///:memory:")
    assert is_there("sqlite:///file:shared?mode=memory&cache=shared&uri=true")


def test_a_waiting_trial_goes_to_one_of_those_that_want_it_at_the_same_moment(database):
    study = optuna.create_study(study_name="queue", storage=open_storage(database))
    for number in range(40):
        study.enqueue_trial({"x": number})
    ids = [trial._trial_id for trial in study.trials]
    together = threading.Barrier(2)

    def take_all(storage):
        taken = []
        for trial_id in ids:
            together.wait(60)
            taken.append(storage.set_trial_state_values(trial_id, TrialState.RUNNING))
        return taken

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(take_all, [open_storage(database), open_storage(database)])
    assert [a != b for a, b in zip(one, other, strict=True)] == [True] * len(ids)
