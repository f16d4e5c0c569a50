"""A password in a storage URL appears in no error, no log, no traceback, no table and no profile."""

import logging
import socket
import traceback

import optuna
import pytest
import sqlalchemy

from layerskip import LayerSkipError
from studies.storage import open_storage
from studies.study import describe_study, list_studies
from studies.trial_loop import run_trials
from tests.postgres import PASSWORD
from tests.studies.worker import measurement

DRIVERS = ["psycopg", "psycopg2"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def unseen(caught, capture):
    """Whether neither an error with all that led to it nor the logs show the password."""
    return PASSWORD not in "".join(traceback.format_exception(caught.value)) + capture.text


@pytest.fixture(autouse=True)
def every_log(caplog):
    """Optuna's log and SQLAlchemy's at their most talkative."""
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "sqlalchemy")
    yield caplog
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.logging.disable_propagation()


@pytest.fixture
def address(postgresql, postgresql_url):
    """The server's address and the name of a database."""
    return f"127.0.0.1:{postgresql.port}/{postgresql_url.rpartition('/')[2]}"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "url",
    [
        "postgresql+{driver}://me:{password}-wrong@{address}",
        "postgresql+{driver}://somebody:{password}@{address}",
        "postgresql+{driver}://me:{password}@{address}-missing",
        "postgresql+{driver}://me:{password}@127.0.0.1:{free}/studies",
        "postgresql+{driver}://me:{password}@no-such-host.invalid/studies",
        "postgresql+{driver}://me:{password}@{address}?unheard_of=1",
        "postgresql+{driver}://{address}?user=me&password={password}-wrong",
        "postgresql+{driver}://me:{password}@{address}?sslmode=require",
    ],
)
def test_a_database_that_cannot_be_opened_is_named_without_its_password(url, driver, address, every_log):
    pytest.importorskip(driver)
    url = url.format(driver=driver, password=PASSWORD, address=address, free=free_port())
    with pytest.raises(LayerSkipError) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)
    assert "***" in str(caught.value)
    assert unseen(caught, every_log)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_server_lost_in_the_middle_is_named_without_its_password(postgresql, address, driver, every_log):
    pytest.importorskip(driver)
    storage = open_storage(f"postgresql+{driver}://me:{PASSWORD}@{address}", retry_seconds=0.5)
    study = optuna.create_study(study_name="s", storage=storage)

    def objective(trial):
        postgresql.stop()
        trial.set_user_attr("key", "value")

    try:
        with pytest.raises(LayerSkipError) as caught:
            next(run_trials(study, objective, storage.heartbeats))
    finally:
        postgresql.start()
    assert "***" in str(caught.value)
    assert unseen(caught, every_log)


def test_a_study_keeps_no_password(postgresql_url, every_log):
    storage = open_storage(postgresql_url)
    study = optuna.create_study(study_name="s", storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    storage.records.add(measurement("s", 0, 1.0))
    assert PASSWORD not in f"{list_studies(storage)} {describe_study(storage, 's', 2)} {every_log.text}"
    assert "s" in text_of(storage.engine)
    assert PASSWORD not in text_of(storage.engine)


def text_of(engine):
    """All that a database's tables hold, as text."""
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    with engine.connect() as connection:
        rows = [row for table in tables.sorted_tables for row in connection.execute(sqlalchemy.select(table))]
    assert len(tables.sorted_tables) > 10
    return str(rows)
