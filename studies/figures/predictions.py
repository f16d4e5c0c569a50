"""How well predictions held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from studies.figures.picture import GREY, HELD_OUT, MEASURED, VERMILION, Picture, Table, figure, times
from studies.statistics import Speedup
from studies.view import StudyView, TrialSummary

_ID, _TITLE = "predictions", "Predicted against measured"
Held = tuple[TrialSummary, Speedup]


def predictions(view: StudyView) -> Picture:
    """What was predicted of candidates and what they then measured, on the search's and on held-out prompts."""
    searched = [(one, one.speedup) for one in view.measured if one.predicted is not None and not one.stopped]
    finals = [(one, one.held_out) for one in view.ranked if one.predicted is not None and one.held_out is not None]
    if not searched and not finals:
        return Picture(_ID, _TITLE, "No candidate was measured yet: all speedups of this study are predicted.", None)
    caption = (
        "Speedups with their 95 % intervals, which come from resampling prompts. On the line, predictions are right."
    )
    if searched:
        caption += (
            f" The dashed line is what predictions are corrected by before they are held against measurements: "
            f"{view.correction:.2f}, the median of measured ÷ predicted on the search's prompts."
        )
    drawn = _drawn(searched, finals, view.correction if searched else None)
    return Picture(_ID, _TITLE, caption, drawn, _table(searched, finals))


def _drawn(searched: Sequence[Held], finals: Sequence[Held], correction: float | None) -> go.Figure:
    predicted = [one.predicted or 0.0 for one, _ in (*searched, *finals)]
    ends = [end for _, speedup in (*searched, *finals) for end in (speedup.low, speedup.high)]
    low, high = 0.95 * min(*predicted, *ends), 1.05 * max(*predicted, *ends)
    drawn = figure(
        height=460,
        xaxis={"title": {"text": "predicted speedup"}, "range": [low, high], "ticksuffix": "×"},
        yaxis={"title": {"text": "measured speedup"}, "range": [low, high], "ticksuffix": "×"},
    )
    _add_line(drawn, low, high, 1.0, "as predicted", {"color": GREY, "width": 1})
    if correction is not None:
        line = {"color": VERMILION, "width": 1, "dash": "dash"}
        _add_line(drawn, low, high, correction, f"corrected by {correction:.2f}", line)
    _add(drawn, searched, "search's prompts", MEASURED)
    _add(drawn, finals, "held-out prompts", HELD_OUT)
    return drawn


def _add_line(drawn: go.Figure, low: float, high: float, slope: float, name: str, line: dict[str, Any]) -> None:
    x = [low, high]
    y = [slope * value for value in x]
    drawn.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="skip"))


def _add(drawn: go.Figure, held: Sequence[Held], name: str, marker: dict[str, Any]) -> None:
    if not held:
        return
    drawn.add_trace(
        go.Scatter(
            x=[one.predicted for one, _ in held],
            y=[speedup.value for _, speedup in held],
            error_y={
                "array": [speedup.high - speedup.value for _, speedup in held],
                "arrayminus": [speedup.value - speedup.low for _, speedup in held],
                "thickness": 1.5,
                "width": 4,
            },
            mode="markers",
            marker=marker,
            name=name,
            text=[f"trial {one.number}: predicted {times(one.predicted)}, measured {s}" for one, s in held],
            hovertemplate="%{text}<extra></extra>",
        )
    )


def _table(searched: Sequence[Held], finals: Sequence[Held]) -> Table:
    rows = [
        (
            str(one.number),
            prompts,
            times(one.predicted),
            times(speedup.value),
            f"{speedup.low:.2f} to {speedup.high:.2f}",
        )
        for prompts, held in (("search", searched), ("held-out", finals))
        for one, speedup in held
    ]
    return Table(("trial", "prompts", "predicted", "measured", "95 %"), rows)
