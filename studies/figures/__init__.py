"""Pictures of a study: functions from a :class:`studies.view.StudyView` to a figure and what is said about it."""

from __future__ import annotations

from studies.figures.acceptance import acceptance
from studies.figures.costs import costs
from studies.figures.history import history
from studies.figures.picture import Picture, Table
from studies.figures.predictions import predictions
from studies.figures.prompts import prompts
from studies.figures.skip_map import skip_map
from studies.figures.sublayers import sublayers
from studies.view import StudyView

__all__ = ["Picture", "Table", "pictures"]

_MOST_ROWS_OF_PROMPTS = 12


def pictures(view: StudyView, best: int) -> list[Picture]:
    """All pictures of a study, in the order in which they are read.

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
