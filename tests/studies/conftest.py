import optuna
import pytest

from studies.storage import open_storage

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def database(tmp_path):
    """The URL of a SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture
def storage(database):
    return open_storage(database)
