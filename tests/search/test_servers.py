"""Real searches whose studies live in PostgreSQL or behind a server, one after another and at once."""

import threading

import pytest

from studies.storage import open_storage
from studies.study import describe_study
from tests.search.searches import random_prompts, records, small_search
from tests.studies.serving import served

pytest.importorskip("grpc")
pytestmark = pytest.mark.slow


@pytest.fixture(params=["postgresql", "postgresql behind a server"])
def url(request, postgresql_url):
    if request.param == "postgresql":
        yield postgresql_url
        return
    with served(postgresql_url) as server:
        yield server.url


def test_a_search_is_kept_and_gone_on_with(llama, url):
    first = small_search(llama, open_storage(url), study_name="s").run()
    kept = {record.id for record in records(open_storage(url), "s")}
    second = small_search(llama, open_storage(url), study_name="s", trials=5).run()
    assert (first.trials, second.trials) == (3, 5)
    assert kept < {record.id for record in records(open_storage(url), "s")}
    assert second.profile.measured.prompt_set == "held-out"
    described = describe_study(open_storage(url), "s", 2)
    assert described["trials"]["complete"] == 5
    assert described["measurements"] == len(records(open_storage(url), "s"))


def test_a_search_waits_for_a_server_that_is_restarted(llama, postgresql, url):
    storage = open_storage(url)
    search = small_search(llama, storage, study_name="s", trials=5)
    postgresql.stop()
    back = threading.Timer(2, postgresql.start)
    back.start()
    try:
        result = search.run()
    finally:
        back.join()
    assert result.trials == 5
    trials = storage.get_all_trials(storage.get_study_id_from_name("s"))
    measured = [trial for trial in trials if trial.user_attrs.get("basis") == "measured"]
    for trial in measured:
        assert len(records(storage, "s", prompt_set="search", trial=trial.number)) == trial.user_attrs["prompts"]
    finalists = records(storage, "s", prompt_set="held-out")
    assert {record.prompt for record in finalists} == {prompt.id for prompt in random_prompts().held_out}
