"""A study as one HTML file that works without a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files

from plotly.offline import get_plotlyjs

from studies.figures import Picture, Table, pictures
from studies.summary import facts, verdict
from studies.view import StudyView


def render_report(view: StudyView, best: int, *, now: datetime | None = None) -> str:
    """The report of a study: HTML with Plotly, styles and data in it, which a browser is told to load nothing for.

    Args:
        view: The study.
        best: Most candidates in the skip map.
        now: When the report is made, in any time zone; None is now.
    """
    shown = pictures(view, best)
    code = (get_plotlyjs(), _resource("report.js"))
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(code)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(view.name)} – layerskip</title>",
        '<link rel="icon" href="data:,">',
        f"<style>{_resource('report.css')}</style>",
    ]
    body = [
        "<main>",
        *_summary(view),
        *_contents(shown),
        *(line for picture in shown for line in _section(picture)),
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


def _summary(view: StudyView) -> list[str]:
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(view))
    return [
        f"<header><h1>{escape(view.name)}</h1>",
        f'<p class="verdict">{escape(verdict(view))}</p>',
        f"<dl>{told}</dl>",
        "<noscript><p>Without JavaScript there are no figures; the tables say the same.</p></noscript></header>",
    ]


def _contents(shown: Sequence[Picture]) -> list[str]:
    links = "".join(f'<li><a href="#{picture.id}">{escape(picture.title)}</a></li>' for picture in shown)
    return [f'<nav aria-label="Figures"><ul>{links}</ul></nav>']


def _section(picture: Picture) -> list[str]:
    lines = [f'<section id="{picture.id}"><h2>{escape(picture.title)}</h2>']
    if picture.figure is None:
        return [*lines, f"<p>{escape(picture.caption)}</p></section>"]
    data = picture.figure.to_json().replace("<", "\\u003c")  # a script element ends at whatever looks like its end
    lines += [
        f"<figure><figcaption>{escape(picture.caption)}</figcaption>",
        f'<div class="drawing" role="img" aria-label="{escape(picture.title)}" data-figure="{picture.id}-data" '
        f'style="height:{picture.figure.layout.height}px"></div></figure>',
        f'<script type="application/json" id="{picture.id}-data">{data}</script>',
    ]
    if picture.table is not None:
        lines.append(_table(picture.table))
    return [*lines, "</section>"]


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return (
        '<details><summary>As a table</summary><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
