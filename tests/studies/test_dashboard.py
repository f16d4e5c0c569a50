"""The dashboard, served for real on a free port and read in a real browser."""

import json
import os
import re
import socket
import threading
from datetime import UTC, datetime
from queue import Queue
from urllib.parse import urlsplit
from urllib.request import urlopen

import optuna
import pytest
import torch
from optuna.storages import RDBStorage

from layerskip import DraftConfig, DraftProfile, FixedLength, SkipSet
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError, InvalidProfileError
from layerskip.fingerprint import identify
from layerskip.profile import Provenance
from studies.dashboard import artifact_store, attach_figures, attach_profile, serve
from studies.study import load_study
from tests.studies.synthetic_studies import StudyBuilder

optuna_dashboard = pytest.importorskip("optuna_dashboard")
FIGURES = {"skip-map", "prompts", "predictions", "acceptance", "sublayers", "costs", "history"}


@pytest.fixture
def serve_storage(storage, tmp_path):
    """Serve the storage in a thread until the tests are over; the dashboard's address."""

    def begin(**options):
        ready = Queue()
        arguments = {"host": "127.0.0.1", "port": 0, "artifacts": tmp_path / "artifacts", "when_ready": ready.put}
        threading.Thread(target=serve, args=(storage,), kwargs=arguments | options, daemon=True).start()
        return ready.get(timeout=60)

    return begin


@pytest.fixture
def served(storage, serve_storage):
    """A dashboard on a storage with one study that is not layerskip's."""
    optuna.create_study(study_name="seen", storage=storage, direction="maximize")
    return serve_storage()


@pytest.fixture
def make_profile(llama, tmp_path):
    """Save a profile of a study, with tensors beside it."""

    def make(study, name="draft_profile.json", token_ids=(1, 2)):
        profile = DraftProfile.of(
            DraftConfig(SkipSet(4, attention=(1,)), stopping=FixedLength(3)),
            DraftWeights(token_ids=torch.tensor(token_ids)),
            model=identify(llama, "makers/tiny"),
            provenance=Provenance(study=study, trial=0, created=datetime(2026, 1, 2, tzinfo=UTC), tool="layerskip"),
        )
        path = tmp_path / name
        profile.save(path)
        return path

    return make


def fetched(url):
    with urlopen(url, timeout=60) as answer:
        return answer.read()


def detail(served, name="s"):
    """What the dashboard is told about a study."""
    summaries = json.loads(fetched(f"{served}api/studies"))["study_summaries"]
    [number] = [summary["study_id"] for summary in summaries if summary["study_name"] == name]
    return number, json.loads(fetched(f"{served}api/studies/{number}"))


class CountingStorage:
    """Counts what is written to a storage."""

    def __init__(self, monkeypatch):
        self.writes = []
        original = RDBStorage.set_study_system_attr

        def count(storage, study_id, key, value):
            self.writes.append(key)
            return original(storage, study_id, key, value)

        monkeypatch.setattr(RDBStorage, "set_study_system_attr", count)


def test_the_dashboard_answers_at_its_address_and_lists_the_study(served):
    assert b"<html" in fetched(served).lower()
    studies = json.loads(fetched(f"{served}api/studies"))["study_summaries"]
    assert [study["study_name"] for study in studies] == ["seen"]


def test_the_dashboard_leaves_the_terminal_alone(served, capfd):
    fetched(f"{served}api/studies")
    assert capfd.readouterr() == ("", "")


def test_a_study_shows_our_figures_and_note_in_a_browser_that_asks_nobody_else(storage, serve_storage, visit):
    builder = StudyBuilder(storage).with_costs().with_single_sublayers()
    builder.predict(10).measure(1).measure_finalists(1)
    served = serve_storage()
    number, told = detail(served)
    assert {figure["id"] for figure in told["plotly_graph_objects"]} == FIGURES
    visited = visit(f"{served}dashboard/studies/{number}")
    page = visited.page
    for title in ("Sublayers skipped by the best candidates", "Predicted and measured speedup"):
        page.locator(".gtitle", has_text=title).wait_for()
    page.goto(f"{served}dashboard/studies/{number}/note")
    page.get_by_text("Best speedup: ").first.wait_for()
    assert {urlsplit(url).hostname for url in visited.requests if not url.startswith(("data:", "blob:"))} == {
        "127.0.0.1"
    }
    assert visited.complaints == []


def test_what_has_not_changed_is_not_written_again(storage, monkeypatch):
    builder = StudyBuilder(storage).predict(12)
    attach_figures(storage, "s")
    counting = CountingStorage(monkeypatch)
    attach_figures(storage, "s")
    assert counting.writes == []
    builder.predict(1)
    attach_figures(storage, "s")
    assert any(key.startswith("dashboard:plot_data:history") for key in counting.writes)
    assert not any(key.startswith("dashboard:plot_data:costs") for key in counting.writes)


def test_a_note_follows_the_study_until_somebody_else_writes_it(storage):
    builder = StudyBuilder(storage).predict(1)
    attach_figures(storage, "s")
    assert "1 candidate evaluated" in optuna_dashboard.get_note(builder.study)
    builder.predict(2)
    attach_figures(storage, "s")
    assert "3 candidates evaluated" in optuna_dashboard.get_note(builder.study)
    optuna_dashboard.save_note(builder.study, "mine")
    builder.predict(1)
    attach_figures(storage, "s")
    assert optuna_dashboard.get_note(builder.study) == "mine"


def test_a_note_holds_no_html(storage):
    builder = StudyBuilder(storage, model="<img src=x onerror=alert(1)>").predict(1)
    attach_figures(storage, "s")
    assert "<" not in optuna_dashboard.get_note(builder.study)


def test_the_objective_has_its_name(storage, serve_storage):
    StudyBuilder(storage)
    _, told = detail(serve_storage())
    assert told["objective_names"] == ["speedup"]


def test_studies_of_others_are_served_as_they_are(storage, served):
    _, told = detail(served, "seen")
    assert told["plotly_graph_objects"] == []
    assert told["note"]["body"] == ""


def test_profiles_and_their_tensors_can_be_downloaded(storage, serve_storage, make_profile):
    StudyBuilder(storage).predict(1)
    path = make_profile("s")
    served = serve_storage(profiles=[path])
    number, told = detail(served)
    contents = {
        one["filename"]: fetched(f"{served}artifacts/{number}/{one['artifact_id']}") for one in told["artifacts"]
    }
    tensors = path.with_name(DraftProfile.load(path).tensors.file)
    assert contents == {path.name: path.read_bytes(), tensors.name: tensors.read_bytes()}


def test_a_profile_is_attached_once_and_again_where_its_copy_is_lost(storage, make_profile, tmp_path):
    StudyBuilder(storage)
    folder, path = tmp_path / "artifacts", make_profile("s")
    for _ in range(2):
        attach_profile(storage, path, artifact_store(folder))
    assert len(list(folder.iterdir())) == 2
    for file in folder.iterdir():
        file.unlink()
    attach_profile(storage, path, artifact_store(folder))
    assert len(list(folder.iterdir())) == 2
    attach_profile(storage, make_profile("s", token_ids=(3, 4)), artifact_store(folder))
    assert len(list(folder.iterdir())) == 4


def test_a_profile_is_attached_by_its_folder_too(storage, make_profile, tmp_path):
    StudyBuilder(storage)
    path = make_profile("s")
    attach_profile(storage, path.parent, artifact_store(tmp_path / "artifacts"))
    copies = {file.read_bytes() for file in (tmp_path / "artifacts").iterdir()}
    assert copies == {path.read_bytes(), path.with_name(DraftProfile.load(path).tensors.file).read_bytes()}


def test_a_profile_of_no_study_here_is_an_error_in_one_line(storage, make_profile, tmp_path):
    StudyBuilder(storage)
    store = artifact_store(tmp_path / "artifacts")
    unknown = re.escape(f"study 'x': no such study in {storage.engine.url}; studies there: s")
    with pytest.raises(InvalidInputError, match=f"^{unknown}$"):
        attach_profile(storage, make_profile("x"), store)
    with pytest.raises(
        InvalidInputError, match="the profile was made by hand; only profiles of a study can be attached"
    ):
        attach_profile(storage, make_profile(None), store)
    with pytest.raises(InvalidProfileError, match=r"missing\.json: cannot read the draft profile"):
        attach_profile(storage, tmp_path / "missing.json", store)
    with pytest.raises(InvalidProfileError, match=r"artifacts/draft_profile\.json: cannot read the draft profile"):
        attach_profile(storage, tmp_path / "artifacts", store)


def test_a_folder_that_cannot_be_made_is_an_error_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match=r"^--artifacts .*/file/below: cannot create the folder: "):
        artifact_store(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_an_error_in_one_line(storage, make_profile, tmp_path):
    StudyBuilder(storage)
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(InvalidInputError, match="cannot be copied to the artifacts: Permission denied"):
        attach_profile(storage, make_profile("s"), artifact_store(folder))
    assert load_study(storage, "s").user_attrs


def test_a_port_in_use_is_an_error_in_one_line(storage, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInputError) as caught:
            serve(storage, host="127.0.0.1", port=port, artifacts=tmp_path, when_ready=pytest.fail)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1, port {port}: Address already in use; choose another with --host and --port"
    )


@pytest.mark.parametrize("host", ["203.0.113.7", "not a host"])
def test_an_address_that_is_not_this_machines_is_an_error_in_one_line(storage, tmp_path, host):
    with pytest.raises(InvalidInputError) as caught:
        serve(storage, host=host, port=0, artifacts=tmp_path, when_ready=pytest.fail)
    assert str(caught.value).startswith(f"cannot listen on {host}, port 0: ")
    assert "None" not in str(caught.value)
    assert "\n" not in str(caught.value)
