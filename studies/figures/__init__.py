"""Figures of studies and comparisons, each with a caption and a table."""

from __future__ import annotations

from studies.figures.candidate_figures import history, predictions, prompts, skip_map
from studies.figures.style import DataTable, Picture
from studies.figures.sublayer_figures import acceptance, costs, sublayers
from studies.view import StudyView

__all__ = ["DataTable", "Picture", "study_figures"]

_MOST_ROWS_OF_PROMPTS = 12


def study_figures(view: StudyView, best: int) -> list[Picture]:
    """All figures of a study, in reading order.

    Args:
        view: The study.
        best: Most candidates in the skip map.
    """
    return [
        skip_map(view, best),
        prompts(view, _MOST_ROWS_OF_PROMPTS),
        predictions(view),
        acceptance(view),
        sublayers(view),
        costs(view),
        history(view),
    ]
