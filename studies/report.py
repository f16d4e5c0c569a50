"""A study as one HTML file that works without a network."""

from __future__ import annotations

from datetime import datetime

from studies.figures import pictures
from studies.page import render_page
from studies.summary import facts, verdict
from studies.view import StudyView


def render_report(view: StudyView, best: int, *, now: datetime | None = None) -> str:
    """The report of a study, as :func:`studies.page.render_page` makes pages.

    Args:
        view: The study.
        best: Most candidates in the skip map.
        now: When the report is made, in any time zone; None is now.
    """
    return render_page(view.name, verdict(view), facts(view), pictures(view, best), now=now)
