"""A real browser for what is drawn: Debian's Chromium, driven by Playwright."""

import os
import shutil
from dataclasses import dataclass, field

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing of the browser's own goes to the network either.
QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Visited:
    """A page that is open, and what it did since.

    Args:
        page: Playwright's page.
        requests: The URLs that it asked for.
        complaints: Errors and warnings on its console, uncaught errors, and dialogs that it opened.
    """

    page: object
    requests: list = field(default_factory=list)
    complaints: list = field(default_factory=list)

    def listen(self):
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._dialog)

    def _console(self, message):
        if message.type not in ("log", "debug", "info"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _dialog(self, dialog):
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium with a profile of its own, so that several test processes may have one each.

    No longer than a module: Playwright keeps an event loop running meanwhile.
    """
    playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    arguments = [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open a page in a window of some width, and listen to it."""
    pages = []

    def open_page(url, *, width=1200, height=900, **options):
        page = chromium.new_page(viewport={"width": width, "height": height}, **options)
        pages.append(page)
        visited = Visited(page)
        visited.listen()
        page.goto(url)
        return visited

    yield open_page
    for page in pages:
        page.close()
