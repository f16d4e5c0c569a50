import optuna
import pytest
import torch

from studies.storage import open_storage

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models are no faster with several threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """References, locks and costs are kept where no user keeps any."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LAYERSKIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def database(tmp_path):
    """The URL of a fresh SQLite file."""
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture
def storage(database):
    return open_storage(database)
