"""What all pictures have in common: colours, axes, and the text and table that stand beside a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, GREY, PALE = "#000000", "#767676", "#e4e4e4"
BLUE, SKY, GREEN, ORANGE = "#0072b2", "#56b4e9", "#009e73", "#e69f00"
VERMILION, PURPLE = "#d55e00", "#cc79a7"

# How figures say what a speedup rests on: by shape as well as by colour.
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
class Table:
    """What a figure shows, as text.

    Args:
        columns: Their names.
        rows: The cells of each row, as many as there are columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure with what is said about it.

    Args:
        id: A word for addresses.
        title: A heading.
        caption: What is to be seen and how it came about; where there is nothing to be seen, why.
        figure: The figure; None if the study has nothing to show in it yet, or the table is all.
        table: The same as text; None where the figure says no more than other tables do.
    """

    id: str
    title: str
    caption: str
    figure: go.Figure | None
    table: Table | None = None


def figure(height: int, **layout: Any) -> go.Figure:
    """An empty figure in the house style, as wide as there is room.

    Args:
        height: In pixels.
        layout: Of the figure, as Plotly has it.
    """
    return go.Figure(layout=go.Layout(template=_TEMPLATE, height=height, **layout))


def break_even(of: go.Figure, axis: str) -> None:
    """Draw the line at which a draft is as fast as plain decoding, across the ``x`` or the ``y`` axis."""
    line = {"line": {"color": BLACK, "dash": "dash", "width": 1}}
    if axis == "x":
        of.add_vline(x=1, **line)
    else:
        of.add_hline(y=1, **line)


def times(speedup: float | None) -> str:
    """A speedup for people."""
    return "" if speedup is None else f"{speedup:.3f}×"


def percent(share: float | None) -> str:
    """A share for people."""
    return "" if share is None else f"{share:.1%}"
