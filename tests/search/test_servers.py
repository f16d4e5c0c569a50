"""Real searches whose studies live in PostgreSQL."""

import threading

import pytest

from studies.ranking import basis_of
from studies.storage import open_storage
from studies.study import describe_study
from tests.search.searches import random_prompts, records, small_search

pytestmark = pytest.mark.slow


def test_a_search_is_kept_and_can_be_resumed(llama, postgresql_url):
    first = small_search(llama, open_storage(postgresql_url), study="s").run()
    kept = {record.id for record in records(open_storage(postgresql_url), "s")}
    second = small_search(llama, open_storage(postgresql_url), study="s", trials=5).run()
    assert (first.trials, second.trials) == (3, 5)
    assert kept < {record.id for record in records(open_storage(postgresql_url), "s")}
    assert second.profile.measured.prompt_set == "held-out"
    described = describe_study(open_storage(postgresql_url), "s", 2)
    assert described["trials"]["pruned"] == 5
    assert described["measurements"] == len(records(open_storage(postgresql_url), "s"))


def test_a_search_waits_for_a_server_that_is_restarted(llama, postgresql, postgresql_url):
    storage = open_storage(postgresql_url)
    search = small_search(llama, storage, study="s", trials=5)
    postgresql.stop()
    back = threading.Timer(2, postgresql.start)
    back.start()
    try:
        result = search.run()
    finally:
        back.join()
    assert result.trials == 5
    trials = storage.get_all_trials(storage.get_study_id_from_name("s"))
    measured = [trial for trial in trials if basis_of(trial) == "measured"]
    for trial in measured:
        assert len(records(storage, "s", prompt_set="search", trial=trial.number)) == trial.user_attrs["prompts"]
    finalists = records(storage, "s", prompt_set="held-out")
    assert {record.prompt for record in finalists} == {prompt.id for prompt in random_prompts().held_out}
