"""Reports as single HTML files that work without a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files

from plotly.offline import get_plotlyjs

from studies.figures import DataTable, Picture, study_figures
from studies.statistics import CROSSES_ONE, Speedup
from studies.study import describe_trials
from studies.view import StudyView


def verdict(view: StudyView) -> str:
    """The best candidate's speedup, its basis, and whether it is a gain."""
    if not view.ranked:
        return "No candidate was evaluated yet."
    best = view.ranked[0]
    basis = {
        "held-out": "measured on held-out prompts",
        "measured": "measured on the search's own prompts, which selected it: expect slightly less",
        "predicted": "predicted; nothing was measured yet",
    }
    sentence = f"Best speedup: {_speedup(best.best_speedup)}, {basis[best.best_basis]}."
    if best.best_speedup.value <= 1:
        return f"{sentence} No candidate beat plain decoding."
    is_gain = best.best_basis == "predicted" or best.best_speedup.low > 1
    return sentence if is_gain else f"{sentence} {CROSSES_ONE}"


def facts(view: StudyView) -> list[tuple[str, str]]:
    """The conditions and the best candidate of a study, as (name, value)."""
    context = view.context
    lines = [("model", f"{context['model']}, {view.num_layers} layers (fingerprint {context['fingerprint']})")]
    if view.ranked:
        best = view.ranked[0]
        skipped = f"{best.config.skip_set} ({len(best.config.skip_set)} of {2 * view.num_layers} sublayers)"
        lines += [
            ("best candidate", f"trial {best.number}"),
            ("skipped", skipped),
            ("draft", best.config.details or "not recorded"),
        ]
    prompts = f"{context['prompts_per_trial']} a measurement, at most {context['max_new_tokens']} new tokens each"
    return [
        *lines,
        ("machine", f"{context['device']}, {context['dtype']}"),
        ("versions", "; ".join(map(_versions, view.versions)) or "not recorded"),
        ("prompts", prompts),
        ("trials", describe_trials(len(view.evaluated), len(view.measured), view.states, len(view.measurements))),
        ("searched", _when(view)),
    ]


def _speedup(speedup: Speedup) -> str:
    return str(speedup) if speedup.low < speedup.high else f"{speedup.value:.2f}×"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


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
    """An HTML page with Plotly, styles and data in it, for which a browser may load nothing.

    Args:
        title: Its heading.
        verdict: The result, in a sentence or two.
        facts: Further facts, as (name, value).
        pictures: The figures.
        now: Time of writing, in any time zone; None is now.
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
        f"<footer>Written {now or datetime.now(UTC):%Y-%m-%d %H:%M %Z} by layerskip {version('layerskip')}.</footer>",
        *(f"<script>{script}</script>" for script in code),
    ]
    return "\n".join(
        ['<!doctype html>\n<html lang="en">\n<head>', *head, "</head>\n<body>", *body, "</body>\n</html>\n"]
    )


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy under which nothing is loaded and no other scripts run."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _resource(name: str) -> str:
    return files("studies").joinpath("data", name).read_text(encoding="utf-8")


def _summary(title: str, verdict: str, facts: Sequence[tuple[str, str]]) -> list[str]:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict)}</p>',
        f"<dl>{terms}</dl>",
        "<noscript><p>Without JavaScript there are no figures; the tables have the same data.</p></noscript></header>",
    ]


def _contents(pictures: Sequence[Picture]) -> list[str]:
    links = "".join(f'<li><a href="#{picture.id}">{escape(picture.title)}</a></li>' for picture in pictures)
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


def _scrolling(table: DataTable) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def render_report(view: StudyView, best: int, *, now: datetime | None = None) -> str:
    """The report of a study, as a page of :func:`render_page`.

    Args:
        view: The study.
        best: Most candidates in the skip map.
        now: Time of writing, in any time zone; None is now.
    """
    return render_page(view.name, verdict(view), facts(view), study_figures(view, best), now=now)
