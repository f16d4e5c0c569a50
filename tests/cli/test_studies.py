"""``layerskip studies`` and ``layerskip dashboard``."""

import json
import select
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from urllib.request import urlopen

import optuna
import pytest
from optuna.trial import create_trial

from layerskip.engine import EagerEngine
from layerskip.fingerprint import identify
from search.prompts import EncodedPrompt, PromptSplit
from search.search import Search
from search.search_task import SearchTask
from search.settings import SearchSettings
from search.space import SearchSpace
from studies.ranking import prediction_of
from studies.storage import open_storage
from studies.study import load_study
from tests.cli.conftest import COMMAND, ENVIRONMENT

URL = "sqlite:///layerskip.db"


@pytest.fixture(scope="module")
def searched_folder(wrapped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    prompts = PromptSplit((EncodedPrompt("a", (1, 2, 3)),), (EncodedPrompt("b", (4, 5, 6)),))
    settings = SearchSettings(trials=2, max_new_tokens=4, finalists=1, seed=0, measuring_share=0.0)
    space = SearchSpace(wrapped.num_layers)
    task = SearchTask(identify(wrapped, "makers/tiny"), prompts, settings, space, "s")
    Search(EagerEngine(wrapped), task, open_storage(f"sqlite:///{folder}/layerskip.db")).run()
    return folder


@pytest.fixture
def searched(searched_folder, elsewhere):
    """A study of two candidates and no measurement in the default storage."""
    shutil.copytree(searched_folder, elsewhere, dirs_exist_ok=True)


def test_list_names_every_study_with_its_best_speedup(layerskip, searched):
    done = layerskip("studies", "list")
    assert (done.status, done.err) == (0, "")
    header, line = done.out.splitlines()
    assert header.split() == ["study", "model", "candidates", "measured", "best", "speedup"]
    name, model, candidates, measured, best, basis = line.split()
    assert (name, model, candidates, measured, basis) == ("s", "makers/tiny", "2", "0", "held-out")
    [summary] = layerskip("studies", "list", "--json").object["studies"]
    assert set(summary) == {"name", "model", "trials", "evaluated", "measured", "best_speedup", "basis"}
    assert (summary["name"], summary["trials"], summary["evaluated"], summary["measured"]) == ("s", 2, 2, 0)
    assert summary["basis"] == "held-out"
    assert f"{summary['best_speedup']:.3f}×" == best


def test_show_prints_the_best_candidates_first_and_whether_they_were_measured(layerskip, searched):
    study = load_study(open_storage(URL), "s")
    second = study.trials[1]
    predicted = prediction_of(second)
    study.add_trial(
        create_trial(
            value=0.75,
            params=second.params,
            distributions=second.distributions,
            user_attrs=second.user_attrs,
            intermediate_values={0: predicted, 1: 0.75},
        )
    )
    shown = layerskip("studies", "show", "s", "--json").object
    # The finalist alone was decoded, on the one prompt held out.
    assert (shown["study"], shown["trials"], shown["measurements"]) == ("s", {"complete": 1, "pruned": 2}, 1)
    bases = {trial["number"]: (trial["speedup"], trial["basis"]) for trial in shown["best"]}
    assert bases == {0: (prediction_of(study.trials[0]), "predicted"), study.trials[-1].number: (0.75, "measured")}
    first, last = shown["best"]
    assert first["held_out_speedup"] is not None  # the finalist
    assert last["held_out_speedup"] is None
    done = layerskip("studies", "show", "s")
    assert (done.status, done.err) == (0, "")
    assert "model     makers/tiny (float32 on " in done.out
    assert "prompts   1 per measurement, at most 4 tokens each" in done.out
    [header] = [line for line in done.out.splitlines() if "basis" in line]
    assert header.split() == ["trial", "speedup", "basis", "held-out", "one-step", "acceptance", "skipped", "draft"]
    for trial in (first, last):
        cells = [str(trial["number"]), f"{trial['speedup']:.3f}×", trial["basis"]]
        if trial["held_out_speedup"] is not None:
            cells.append(f"{trial['held_out_speedup']:.3f}×")
        cells.append(f"{trial['acceptance']:.0%}")
        [line] = [line for line in done.out.splitlines() if line.split()[: len(cells)] == cells]
        assert trial["skip_set"] in line
    [only] = layerskip("studies", "show", "s", "--best", "1", "--json").object["best"]
    assert only == first


def test_a_storage_without_studies_has_none(layerskip, elsewhere):
    open_storage(URL)
    assert layerskip("studies", "list").out == f"no studies in {URL}; --storage names another database\n"
    assert layerskip("studies", "list", "--json").object == {"studies": []}


def test_an_unknown_study_is_wrong_usage_and_the_known_ones_are_listed(layerskip, searched):
    done = layerskip("studies", "show", "x")
    assert done.status == 2
    assert done.error == f"study 'x': no such study in {URL}; studies there: s"


@pytest.mark.parametrize("command", [["studies", "list"], ["studies", "show", "s"], ["dashboard"]])
def test_looking_at_a_storage_that_is_not_there_makes_no_file(layerskip, elsewhere, command):
    done = layerskip(*command)
    assert done.status == 1
    assert done.error.startswith(f"storage '{URL}': no such file")
    assert list(elsewhere.iterdir()) == []


def test_the_storage_can_be_named_by_option_and_by_environment(layerskip, monkeypatch, tmp_path):
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    optuna.create_study(study_name="there", storage=open_storage(url))
    assert layerskip("studies", "list").status == 1
    [summary] = layerskip("studies", "list", "--storage", url, "--json").object["studies"]
    assert summary["name"] == "there"
    monkeypatch.setenv("LAYERSKIP_STORAGE", url)
    assert layerskip("studies", "list", "--json").object["studies"] == [summary]


def test_a_long_name_is_printed_whole_so_that_it_can_be_copied(layerskip):
    name = "smollm2-135m-instruct-made-on-a-tuesday-with-a-name-longer-than-a-terminal-is-wide-01234567"
    optuna.create_study(study_name=name, storage=open_storage(URL))
    assert name in layerskip("studies", "list").out


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize("url", ["nothing://me:{}@host/db", "me:{}@host", "postgresql://me:{}@host:port/db"])
def test_a_password_in_a_storage_url_is_never_printed(layerskip, url, debug):
    done = layerskip("studies", "list", "--storage", url.format("s3cr3t"), *debug)
    assert done.status == 1
    assert "s3cr3t" not in done.out + done.err
    assert "unexpected" not in done.err


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def dashboard_process():
    """A dashboard in a process of its own, and its address."""
    port = free_port()
    command = [COMMAND, "dashboard", "--port", str(port), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        try:
            assert process.stderr.readline() == f"dashboard on http://127.0.0.1:{port}/; Ctrl-C stops it\n"
            yield process, port
        finally:
            process.kill()


@pytest.mark.usefixtures("interruptible")
def test_the_dashboard_says_where_it_is_serves_the_study_and_ends_with_ctrl_c(searched):
    with dashboard_process() as (process, port):
        readable, *_ = select.select([process.stdout], [], [], 20)
        assert readable, "the address must be on stdout while the dashboard runs, not only at its end"
        announced = json.loads(process.stdout.readline())
        assert announced == {"url": f"http://127.0.0.1:{port}/"}
        with urlopen(f"{announced['url']}api/studies", timeout=60) as answer:
            [study] = json.load(answer)["study_summaries"]
        assert study["study_name"] == "s"
        time.sleep(0.5)  # for the server to be done with the request
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "layerskip: interrupted\n")


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_dashboard_in_the_middle_of_a_request_too(searched):
    with dashboard_process() as (process, port), socket.create_connection(("127.0.0.1", port)) as request:
        request.sendall(b"POST /api/studies HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        time.sleep(1)  # for the server to wait for the rest of it
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_port_in_use_is_wrong_usage(layerskip, searched):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = layerskip("dashboard", "--port", port)
    assert done.status == 2
    assert done.error.startswith(f"cannot listen on 127.0.0.1, port {port}: ")


@pytest.mark.parametrize("command", [["studies", "list"], ["studies", "show", "s"], ["dashboard"]], ids=" ".join)
def test_the_password_of_a_real_server_is_never_printed(layerskip, postgresql, command):
    right = postgresql.url("postgres", password="s3cr3t")
    for url in (right, right.replace("/postgres", "/missing"), right.replace("127.0.0.1", "no-such-host.invalid")):
        done = layerskip(*command, "--storage", url)
        assert done.status == 1
        assert done.error.startswith("storage 'postgresql+psycopg://me:***@")
        debugged = layerskip(*command, "--storage", url, "--debug")
        assert "Traceback" in debugged.err
        assert "s3cr3t" not in done.err + debugged.err + debugged.out


def test_a_study_of_a_newer_version_is_listed_but_not_shown(layerskip, searched):
    study = optuna.load_study(study_name="s", storage=open_storage(URL))
    study.set_user_attr("layerskip", {"format": 1000})
    assert layerskip("studies", "list").status == 0
    done = layerskip("studies", "show", "s")
    assert done.status == 2
    assert done.error == "study 's': was made by a newer version of layerskip; update layerskip"
