"""Take the documentation's pictures of a study: ``python docs/screenshots.py STUDY --storage sqlite:///layerskip.db``.

Needs Chromium on the PATH and the ``test`` extra. The storage is given what ``layerskip dashboard`` attaches.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from queue import Queue
from typing import Annotated, Any

import typer
from playwright.sync_api import sync_playwright

from studies.dashboard import serve
from studies.report import render_report
from studies.storage import open_existing_storage
from studies.study import load_study
from studies.view import view_study

FOLDER = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1000, 800
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAWN = ".main-svg"


def take(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Annotated[str, typer.Option(help="Where it lives.")] = "sqlite:///layerskip.db",
    folder: Annotated[Path, typer.Option(help="Where to put the pictures.")] = FOLDER,
    profile: Annotated[list[Path] | None, typer.Option(help="Draft profile to attach in the dashboard.")] = None,
) -> None:
    """Write report.png and dashboard.png."""
    folder.mkdir(parents=True, exist_ok=True)
    database = open_existing_storage(storage)
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--disable-gpu"])
        report = Path(scratch) / "report.html"
        report.write_text(render_report(view_study(database, study), best=6), encoding="utf-8")
        _take_report(browser, report.as_uri(), folder)
        ready: Queue[str] = Queue()
        told = {"host": "127.0.0.1", "port": 0, "artifacts": Path(scratch), "profiles": profile or []}
        threading.Thread(target=serve, args=(database,), kwargs=told | {"when_ready": ready.put}, daemon=True).start()
        number = load_study(database, study)._study_id
        _take_dashboard(browser, f"{ready.get(timeout=120)}dashboard/studies/{number}", folder)
        browser.close()


def _take_report(browser: Any, url: str, folder: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(url)
    page.locator(DRAWN).first.wait_for()
    page.screenshot(path=folder / "report.png")
    page.close()


def _take_dashboard(browser: Any, url: str, folder: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTH + 200, "height": HEIGHT + 200})
    page.goto(url)
    ours = page.locator(".gtitle", has_text="Sublayers skipped by the best candidates")
    ours.wait_for()
    page.wait_for_load_state("networkidle")
    ours.evaluate("title => title.closest('.js-plotly-plot').scrollIntoView({ block: 'center' })")
    page.screenshot(path=folder / "dashboard.png")
    page.close()


if __name__ == "__main__":
    typer.run(take)
