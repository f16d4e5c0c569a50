"""A study as one HTML file that works without a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files

from plotly.offline import get_plotlyjs

from studies.figures import pictures
from studies.figures.picture import Picture, Table
from studies.statistics import CROSSES_ONE
from studies.view import StudyView, TrialSummary


def verdict(view: StudyView) -> str:
    """The best candidate's speedup, what it rests on, and whether it pays."""
    if not view.ranked:
        return "No candidate was looked at yet."
    best = view.ranked[0]
    basis = {
        "held-out": "measured on prompts that the search never saw",
        "measured": "measured on the search's own prompts, by which it was chosen: expect a little less",
        "predicted": "predicted; nothing was measured yet",
    }
    expected = best.figure.value
    if best.standing == "predicted" and view.measured:
        expected *= view.correction
        basis["predicted"] = "predicted; what was measured was slower"
        if view.correction != 1:
            basis["predicted"] += f", and {view.correction:.2f} times what was predicted of it"
    said = f"Best speedup: {_figure(best)}, {basis[best.standing]}."
    if expected <= 1:
        return f"{said} No candidate beat plain decoding."
    return said if best.standing == "predicted" or best.figure.low > 1 else f"{said} {CROSSES_ONE}"


def facts(view: StudyView) -> list[tuple[str, str]]:
    """What one wants to know of a study beside its figures, as (name, value)."""
    context = view.context
    told = [("model", f"{context['model']}, {view.num_layers} layers (fingerprint {context['fingerprint']})")]
    if view.ranked:
        best = view.ranked[0]
        skipped = f"{best.config.skip_set} ({len(best.config.skip_set)} of {2 * view.num_layers} sublayers)"
        told += [
            ("best candidate", f"trial {best.number}"),
            ("left out", skipped),
            ("draft", best.config.details or "not recorded"),
        ]
    prompts = f"{context['prompts_per_trial']} a measurement, at most {context['max_new_tokens']} new tokens each"
    return [
        *told,
        ("machine", f"{context['device']}, {context['dtype']}"),
        ("versions", "; ".join(_versions(one) for one in view.versions) or "not recorded"),
        ("prompts", prompts),
        ("trials", _trials(view)),
        ("searched", _when(view)),
    ]


def _figure(best: TrialSummary) -> str:
    has_interval = best.figure.low < best.figure.high
    return str(best.figure) if has_interval else f"{best.figure.value:.2f}×"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _trials(view: StudyView) -> str:
    counts = [f"{len(view.seen)} candidates looked at", f"{len(view.measured)} measured"]
    names = {"fail": "failed or interrupted", "waiting": "queued", "running": "running", "pruned": "pruned"}
    counts += [f"{view.states[state]} {name}" for state, name in names.items() if view.states.get(state)]
    return f"{', '.join(counts)}; {len(view.measurements)} prompts decoded both ways"


def _when(view: StudyView) -> str:
    if view.began is None:
        return "not yet"
    ended = f" to {view.ended:%Y-%m-%d %H:%M}" if view.ended else ""
    return f"{view.began:%Y-%m-%d %H:%M}{ended}"


def render_page(
    title: str,
    verdict: str,
    facts: Sequence[tuple[str, str]],
    pictures: Sequence[Picture],
    *,
    now: datetime | None = None,
) -> str:
    """A page: HTML with Plotly, styles and data in it, which a browser is told to load nothing for.

    Args:
        title: Its heading.
        verdict: What it comes to, in a sentence or two.
        facts: What else one wants to know, as (name, value).
        pictures: What it shows.
        now: When the page is made, in any time zone; None is now.
    """
    code = (get_plotlyjs(), _resource("report.js"))
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(code)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(title)} – layerskip</title>",
        '<link rel="icon" href="data:,">',
        f"<style>{_resource('report.css')}</style>",
    ]
    body = [
        "<main>",
        *_summary(title, verdict, facts),
        *_contents(pictures),
        *(line for picture in pictures for line in _section(picture)),
        "</main>",
        f"<footer>Made {now or datetime.now(UTC):%Y-%m-%d %H:%M %Z} by layerskip {version('layerskip')}.</footer>",
        *(f"<script>{script}</script>" for script in code),
    ]
    return "\n".join(
        ['<!doctype html>\n<html lang="en">\n<head>', *head, "</head>\n<body>", *body, "</body>\n</html>\n"]
    )


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy: nothing is loaded, and no scripts run but these."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> str:
    return files("studies").joinpath("data", name).read_text(encoding="utf-8")


def _summary(title: str, verdict: str, facts: Sequence[tuple[str, str]]) -> list[str]:
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict)}</p>',
        f"<dl>{told}</dl>",
        "<noscript><p>Without JavaScript there are no figures; the tables say the same.</p></noscript></header>",
    ]


def _contents(shown: Sequence[Picture]) -> list[str]:
    links = "".join(f'<li><a href="#{picture.id}">{escape(picture.title)}</a></li>' for picture in shown)
    return [f'<nav aria-label="Figures"><ul>{links}</ul></nav>']


def _section(picture: Picture) -> list[str]:
    lines = [f'<section id="{picture.id}"><h2>{escape(picture.title)}</h2>']
    if picture.figure is None:
        shown = [] if picture.table is None else [_scrolling(picture.table)]
        return [*lines, f"<p>{escape(picture.caption)}</p>", *shown, "</section>"]
    data = picture.figure.to_json().replace("<", "\\u003c")  # a script element ends at whatever looks like its end
    lines += [
        f"<figure><figcaption>{escape(picture.caption)}</figcaption>",
        f'<div class="drawing" role="img" aria-label="{escape(picture.title)}" data-figure="{picture.id}-data" '
        f'style="height:{picture.figure.layout.height}px"></div></figure>',
        f'<script type="application/json" id="{picture.id}-data">{data}</script>',
    ]
    if picture.table is not None:
        lines.append(f"<details><summary>As a table</summary>{_scrolling(picture.table)}</details>")
    return [*lines, "</section>"]


def _scrolling(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def render_report(view: StudyView, best: int, *, now: datetime | None = None) -> str:
    """The report of a study, as :func:`studies.report.render_page` makes pages.

    Args:
        view: The study.
        best: Most candidates in the skip map.
        now: When the report is made, in any time zone; None is now.
    """
    return render_page(view.name, verdict(view), facts(view), pictures(view, best), now=now)
