"""The report: one file, read in a real browser."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from optuna.trial import create_trial

from layerskip import DraftConfig, SkipSet
from studies.figures import study_figures
from studies.ranking import prediction_of
from studies.report import render_report, verdict
from studies.view import view_study
from tests.studies.synthetic_studies import StudyBuilder

HOSTILE = "<script>alert('study')</script>"
HOSTILE_MODEL = "</script><img src=x onerror=alert('model')>"
CONFIG = DraftConfig(SkipSet(6)).to_json()
# Of each drawing, how many traces it shows.
COUNT_TRACES = "[...document.querySelectorAll('.drawing')].map(d => d.querySelectorAll('g.trace, g.hm').length)"
WIDTHS = "[...document.querySelectorAll('.drawing .main-svg')].map(svg => svg.getBoundingClientRect().width)"
STAGES = {
    "no trial": lambda builder: builder,
    "one candidate": lambda builder: builder.predict(1),
    "predictions without costs": lambda builder: builder.predict(12),
    "predictions": lambda builder: builder.with_costs().with_single_sublayers().predict(12),
    "one hopeless measurement": lambda builder: builder.predict(5).measure(1, stopped=True),
    "measurements": lambda builder: builder.with_costs().predict(12).measure(2),
    "finalists that were never measured in the search": lambda builder: builder.predict(4).measure_finalists(1),
}


@pytest.fixture
def reported(storage, tmp_path):
    """Write the report of a study; its address and its text."""

    def write(name):
        file = tmp_path / "report.html"
        file.write_text(render_report(view_study(storage, name), 8), encoding="utf-8")
        return file.as_uri(), file.read_text(encoding="utf-8")

    return write


@pytest.fixture(scope="module")
def full(searched, tmp_path_factory):
    """The report of a study at its end."""
    file = tmp_path_factory.mktemp("reports") / "report.html"
    file.write_text(render_report(searched, 8), encoding="utf-8")
    return file.as_uri()


def until(page, holds):
    """Wait for a page; Playwright's own way evaluates a text, which the page forbids."""
    while not holds():
        page.wait_for_timeout(20)


def test_a_report_draws_every_figure_without_a_network_and_without_a_complaint(full, visit):
    visited = visit(full, offline=True)
    traces = visited.page.evaluate(COUNT_TRACES)
    assert len(traces) == 7
    assert all(traces)
    assert visited.requests == [full]
    assert visited.complaints == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_study_can_be_reported_at_any_stage(storage, reported, visit, stage):
    STAGES[stage](StudyBuilder(storage))
    url, _ = reported("s")
    visited = visit(url)
    expected = [picture.figure is not None for picture in study_figures(view_study(storage, "s"), 8)]
    assert visited.page.locator("section").count() == len(expected) == 7
    traces = visited.page.evaluate(COUNT_TRACES)
    assert len(traces) == sum(expected)
    assert all(traces)
    assert visited.complaints == []


@pytest.mark.parametrize("layers", [30, 80])
def test_a_report_of_a_deep_model_fits_a_phone(storage, reported, visit, layers):
    builder = StudyBuilder(storage, layers=layers).with_costs().with_single_sublayers()
    builder.predict(4).measure(1).measure_finalists(1)
    visited = visit(reported("s")[0], width=390, height=844)
    assert visited.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(width <= 390 for width in visited.page.evaluate(WIDTHS))
    sizes = visited.page.evaluate(
        "[...document.querySelectorAll('.main-svg text')].map(text => parseFloat(getComputedStyle(text).fontSize))"
    )
    assert min(sizes) >= 10


def test_figures_follow_the_window(full, visit):
    visited = visit(full)
    visited.page.set_viewport_size({"width": 500, "height": 900})
    until(visited.page, lambda: max(visited.page.evaluate(WIDTHS)) <= 500)
    assert visited.complaints == []


def test_figures_fit_the_paper_while_printing_and_the_window_afterwards(full, visit):
    visited = visit(full)
    before = visited.page.evaluate(WIDTHS)
    visited.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert max(visited.page.evaluate(WIDTHS)) <= 700  # an A4 page with its margins has about 700
    visited.page.evaluate("dispatchEvent(new Event('afterprint'))")
    until(visited.page, lambda: visited.page.evaluate(WIDTHS) == before)
    assert visited.page.pdf(format="A4").startswith(b"%PDF-")
    assert visited.complaints == []


def test_names_that_look_like_html_stay_text(storage, reported, visit):
    StudyBuilder(storage, HOSTILE, model=HOSTILE_MODEL).predict(1)
    url, _ = reported(HOSTILE)
    visited = visit(url)
    assert visited.page.locator("h1").inner_text() == HOSTILE
    assert HOSTILE_MODEL in visited.page.locator("dl").inner_text()
    assert visited.page.locator("img").count() == 0
    assert visited.complaints == []


def test_sources_that_look_like_html_stay_text(storage, reported, visit):
    builder = StudyBuilder(storage).predict(1)
    attributes = {"source": HOSTILE_MODEL, "config": CONFIG}
    builder.study.add_trial(create_trial(value=1.0, user_attrs=attributes, intermediate_values={0: 1.0, 1: 1.0}))
    visited = visit(reported("s")[0])
    assert HOSTILE_MODEL in visited.page.locator("#history .legend").text_content()
    assert visited.page.locator("img").count() == 0
    assert visited.complaints == []


class _Counting(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(204)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_browser_refuses_whatever_a_report_would_load_or_run(full, visit):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Counting) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        visited = visit(full)
        url = f"http://127.0.0.1:{server.server_port}/"
        ran = visited.page.evaluate(
            """async url => {
                await fetch(url).catch(() => {});
                await new Promise(done => {
                    const image = new Image();
                    image.onload = image.onerror = done;
                    image.src = url;
                });
                const script = document.createElement("script");
                script.textContent = "window.ran = true";
                document.body.append(script);
                return Boolean(window.ran);
            }""",
            url,
        )
        server.shutdown()
    assert server.asked == []
    assert ran is False
    assert all("Content Security Policy" in complaint for complaint in visited.complaints)
    assert len(visited.complaints) >= 3


def test_a_report_says_what_its_speedup_rests_on(storage, reported):
    builder = StudyBuilder(storage).predict(5)
    assert "predicted; nothing was measured yet" in reported("s")[1]
    builder.measure(1, off=1.0)
    assert "measured on the search&#x27;s own prompts, which selected it" in reported("s")[1]
    builder.measure_finalists(1)
    assert "measured on held-out prompts" in reported("s")[1]


def test_a_report_says_where_the_best_speedup_shows_no_gain(storage):
    builder = StudyBuilder(storage).predict(5)
    best = max(map(prediction_of, builder.trials))
    builder.measure(1, off=1.05 / best)  # its interval reaches a tenth below and above
    assert verdict(view_study(storage, "s")).endswith(
        ". No clear gain (the interval crosses 1×): nothing was shown to be faster."
    )
    builder.measure(1, off=1.5)
    assert "No clear gain" not in verdict(view_study(storage, "s"))


def test_without_scripts_the_tables_say_what_the_figures_show(full, visit):
    visited = visit(full, java_script_enabled=False)
    assert visited.page.locator("noscript").count() == 1
    visited.page.locator("summary").first.click()
    assert visited.page.locator("section").first.locator("td", has_text="held-out").first.is_visible()
