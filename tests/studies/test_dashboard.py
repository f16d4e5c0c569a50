"""The dashboard, served for real on a free port."""

import json
import socket
import threading
from queue import Queue
from urllib.request import urlopen

import optuna
import pytest

from layerskip import InvalidInputError
from studies.dashboard import serve

pytest.importorskip("optuna_dashboard")


@pytest.fixture
def served(storage):
    """The address of a dashboard that a thread serves until the tests are over, on a storage with one study."""
    optuna.create_study(study_name="seen", storage=storage, direction="maximize")
    ready = Queue()
    arguments = {"host": "127.0.0.1", "port": 0, "when_ready": ready.put}
    threading.Thread(target=serve, args=(storage,), kwargs=arguments, daemon=True).start()
    return ready.get(timeout=60)


def test_the_dashboard_answers_where_it_said_and_lists_the_study(served):
    with urlopen(served, timeout=60) as page:
        assert page.status == 200
        assert b"<html" in page.read().lower()
    with urlopen(f"{served}api/studies", timeout=60) as answer:
        studies = json.load(answer)["study_summaries"]
    assert [study["study_name"] for study in studies] == ["seen"]


def test_the_dashboard_leaves_the_terminal_alone(served, capfd):
    with urlopen(f"{served}api/studies", timeout=60) as answer:
        answer.read()
    assert capfd.readouterr() == ("", "")


def test_a_port_in_use_is_an_error_in_one_line(storage):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInputError) as caught:
            serve(storage, host="127.0.0.1", port=port, when_ready=pytest.fail)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another with --host and --port"
    )


@pytest.mark.parametrize("host", ["203.0.113.7", "not a host"])
def test_an_address_that_is_not_this_machines_is_an_error_in_one_line(storage, host):
    with pytest.raises(InvalidInputError) as caught:
        serve(storage, host=host, port=0, when_ready=pytest.fail)
    assert str(caught.value).startswith(f"cannot listen on {host}, port 0: ")
    assert "None" not in str(caught.value)
    assert "\n" not in str(caught.value)
