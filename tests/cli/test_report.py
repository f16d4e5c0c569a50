"""``layerskip report``, from a real search to the page."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import optuna
import pytest

from cli import main
from studies.storage import open_storage
from studies.study import SINGLE_SUBLAYER_KEY, VERSIONS_KEY, load_study
from studies.view import view_study

STORAGE = "sqlite:///layerskip.db"


@pytest.fixture(scope="module")
def searched(model_folder, tmp_path_factory):
    """A folder with a study, and the study's name."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "prompts.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    options = "--prompts prompts.txt --max-new-tokens 6 --finalists 2 --seed 0 --trials 25 --json"
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(StringIO()) as out:
        patched.delenv("LAYERSKIP_STORAGE", raising=False)
        patched.chdir(folder)
        assert main.run(["search", str(model_folder), *options.split()]) == 0
    return folder, json.loads(out.getvalue())["study"]


@pytest.fixture
def study(searched, elsewhere):
    """The name of a study of 25 candidates and two finalists in the default storage."""
    folder, name = searched
    shutil.copytree(folder, elsewhere, dirs_exist_ok=True)
    return name


def test_a_search_leaves_all_that_its_report_shows(layerskip, study, visit):
    done = layerskip("report", study, "-o", "found.html")
    assert (done.status, done.err) == (0, "")
    verdict, written = done.out.splitlines()
    assert verdict.startswith("Best speedup: ")
    assert written == "report    found.html"
    view = view_study(open_storage(STORAGE), study)
    assert set(view.single_sublayer_acceptance) == set(range(2 * view.num_layers))
    assert view.costs is not None
    assert all(trial.draft_cost > 0 for trial in view.evaluated)
    assert {trial.source for trial in view.trials} > {"nothing skipped", "tpe"}
    assert [*view.versions[0]] == ["python", "layerskip", "torch", "transformers"]
    visited = visit(Path("found.html").absolute().as_uri())
    assert visited.page.locator(".verdict").inner_text() == verdict
    assert visited.page.locator(".drawing .main-svg").count() == 7 * 3
    assert visited.page.title() == f"{study} – layerskip"
    assert visited.complaints == []


def test_resuming_a_study_adds_no_versions_that_it_has_already(layerskip, study, model_folder):
    options = ["--prompts", "prompts.txt", "--max-new-tokens", 6, "--finalists", 1, "--trials", 26]
    assert layerskip("search", model_folder, *options).status == 0
    attributes = load_study(open_storage(STORAGE), study).user_attrs
    assert len(attributes[VERSIONS_KEY]) == 1
    assert len(attributes[SINGLE_SUBLAYER_KEY]) == 8


def test_report_writes_report_html_unless_told_otherwise(layerskip, study):
    done = layerskip("report", study, "--json")
    assert done.object == {"report": "report.html", "study": study}
    first = Path("report.html").read_text()
    assert layerskip("report", study, "--best", 1).status == 0
    assert Path("report.html").read_text() != first
    assert [file.name for file in Path().iterdir() if file.name.endswith(".tmp")] == []


@pytest.fixture
def anothers(elsewhere):
    """A study that layerskip did not make."""
    optuna.create_study(study_name="theirs", storage=open_storage(STORAGE), direction="maximize")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x"], f"study 'x': no such study in {STORAGE}; studies there: theirs"),
        (["theirs"], "study 'theirs': was not made by this version of layerskip; search anew"),
        (["theirs", "-o", "no/report.html"], "--out no/report.html: no such folder: "),
        (["theirs", "--out", "."], "--out .: is a folder; expected a file name"),
        (["theirs", "--best", "0"], "Invalid value for '--best': "),
    ],
)
def test_what_cannot_be_reported_is_wrong_usage_in_one_line(layerskip, anothers, arguments, said):
    done = layerskip("report", *arguments)
    assert done.status == 2
    assert done.error.startswith(said)
    assert not Path("report.html").exists()


def test_a_storage_that_is_not_there_is_not_made(layerskip, elsewhere):
    done = layerskip("report", "s")
    assert done.status == 1
    assert done.error.startswith(f"storage '{STORAGE}': no such file")
    assert list(elsewhere.iterdir()) == []
