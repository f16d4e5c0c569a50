import optuna
import pytest

from studies.storage import open_storage
from studies.view import view_study
from tests.studies.synthetic_studies import searched_study

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def database(tmp_path):
    """The URL of a SQLite file that is not there yet."""
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture
def storage(database):
    return open_storage(database)


@pytest.fixture(scope="session")
def searched_storage(tmp_path_factory):
    """A storage with one study, ``s``, at its end; not to be written to."""
    storage = open_storage(f"sqlite:///{tmp_path_factory.mktemp('searched')}/studies.db")
    searched_study(storage)
    return storage


@pytest.fixture(scope="session")
def searched(searched_storage):
    """That study as its pictures need it."""
    return view_study(searched_storage, "s")
