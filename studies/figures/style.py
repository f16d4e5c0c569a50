"""The common style of figures: colours, axes, captions and tables, and speedups drawn in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from studies.statistics import PromptTimes, speedup_of_all, speedup_of_prompt

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, GREY, PALE = "#000000", "#767676", "#e4e4e4"
BLUE, SKY, GREEN, ORANGE = "#0072b2", "#56b4e9", "#009e73", "#e69f00"
VERMILION, PURPLE = "#d55e00", "#cc79a7"

# The basis of a speedup, by shape as well as by colour.
PREDICTED: dict[str, Any] = {"symbol": "circle-open", "color": BLUE, "size": 7, "line": {"width": 1.5}}
MEASURED: dict[str, Any] = {"symbol": "diamond", "color": VERMILION, "size": 10}
HELD_OUT: dict[str, Any] = {"symbol": "square", "color": GREEN, "size": 10}

_AXIS = {
    "automargin": True,
    "fixedrange": True,  # a finger that scrolls the page shall not zoom
    "gridcolor": PALE,
    "linecolor": GREY,
    "showline": True,
    "tickcolor": GREY,
    "ticks": "outside",
    "title": {"standoff": 8},
    "zeroline": False,
}
_TEMPLATE = go.layout.Template(
    layout={
        "colorway": [BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK],
        "dragmode": False,
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#1a1a1a"},
        "hoverlabel": {"align": "left", "bgcolor": "white"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


@dataclass(frozen=True)
class DataTable:
    """The data of a figure, as text.

    Args:
        columns: Names of the columns.
        rows: A cell for each column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure with its title, caption and table.

    Args:
        id: A word for addresses.
        title: A heading.
        caption: What the figure shows and how it came about; where there is nothing to show, why.
        figure: The figure; None if there is nothing to draw yet, or the table is all.
        table: The same data as text; None if there is nothing to show yet.
    """

    id: str
    title: str
    caption: str
    figure: go.Figure | None
    table: DataTable | None = None


def empty_figure(height: int, **layout: Any) -> go.Figure:
    """An empty figure in the common style, as wide as there is room.

    Args:
        height: In pixels.
        layout: Of the figure, as Plotly has it.
    """
    return go.Figure(layout=go.Layout(template=_TEMPLATE, height=height, **layout))


def add_break_even(drawn: go.Figure, axis: str) -> None:
    """Draw the line at which a draft is as fast as plain decoding, across the ``x`` or the ``y`` axis."""
    line = {"line": {"color": BLACK, "dash": "dash", "width": 1}}
    if axis == "x":
        drawn.add_vline(x=1, **line)
    else:
        drawn.add_hline(y=1, **line)


def format_speedup(speedup: float | None) -> str:
    """A speedup as text; nothing for None."""
    return "" if speedup is None else f"{speedup:.3f}×"


def format_percent(share: float | None) -> str:
    """A share as text; nothing for None."""
    return "" if share is None else f"{share:.1%}"


@dataclass(frozen=True)
class SpeedupRow:
    """A decoding method, or a candidate, whose speedup is drawn in a row.

    Args:
        name: Its name in hover texts.
        label: Its name beside the row; ``<br>`` breaks a line.
        kind: Its name in the legend, which lists each kind once.
        marker: Marker of its kind.
        prompts: Its measured prompts.
    """

    name: str
    label: str
    kind: str
    marker: dict[str, Any]
    prompts: Sequence[PromptTimes]


def speedup_rows(rows: Sequence[SpeedupRow]) -> go.Figure:
    """Speedups, a row each and the first on top: of every prompt, and of all together with an interval.

    Args:
        rows: At least one.
    """
    drawn = empty_figure(
        height=46 * len(rows) + 130,
        xaxis={"title": {"text": "speedup"}, "ticksuffix": "×"},
        yaxis={
            "autorange": False,
            "range": [len(rows) - 0.5, -0.6],
            "showgrid": False,
            "tickvals": list(range(len(rows))),
            "ticktext": [row.label for row in rows],
        },
    )
    add_break_even(drawn, "x")
    for kind in dict.fromkeys(row.kind for row in rows):
        numbered = [(y, row) for y, row in enumerate(rows) if row.kind == kind]
        _add_prompts(drawn, numbered)
        _add_totals(drawn, numbered)
    return drawn


def _add_prompts(drawn: go.Figure, rows: Sequence[tuple[int, SpeedupRow]]) -> None:
    dots = [(y + 0.22, prompt) for y, row in rows for prompt in row.prompts]
    marker = rows[0][1].marker
    drawn.add_trace(
        go.Scatter(
            x=[speedup_of_prompt(prompt) for _, prompt in dots],
            y=[y for y, _ in dots],
            mode="markers",
            marker={"symbol": f"{marker['symbol']}-open", "color": marker["color"], "size": 6, "opacity": 0.75},
            showlegend=False,
            text=[
                f"prompt {prompt.prompt}: {prompt.plain_seconds:.2f} s plain, {prompt.draft_seconds:.2f} s drafting, "
                f"{prompt.accepted} of {prompt.drafted} tokens accepted"
                for _, prompt in dots
            ],
            hovertemplate="%{x:.2f}×<br>%{text}<extra></extra>",
        )
    )


def _add_totals(drawn: go.Figure, rows: Sequence[tuple[int, SpeedupRow]]) -> None:
    totals = [speedup_of_all(row.prompts) for _, row in rows]
    drawn.add_trace(
        go.Scatter(
            x=[total.value for total in totals],
            y=[y - 0.12 for y, _ in rows],
            error_x={
                "array": [total.high - total.value for total in totals],
                "arrayminus": [total.value - total.low for total in totals],
                "thickness": 2,
                "width": 5,
            },
            mode="markers",
            marker=rows[0][1].marker | {"size": 11},
            name=rows[0][1].kind,
            text=[f"{row.name}: {total}" for (_, row), total in zip(rows, totals, strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )
    )
