"""Speedups, a row for each of several ways to decode: its prompts, and all of them together with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from studies.figures.picture import break_even, figure
from studies.statistics import PromptTimes, speedup_of_all, speedup_of_prompt


@dataclass(frozen=True)
class Row:
    """One way to decode.

    Args:
        name: What it is called where there is room.
        label: What stands beside the row; ``<br>`` breaks a line.
        kind: What it is; the legend names each kind once.
        style: Marker of its kind.
        prompts: Each prompt, decoded plainly and in this way.
    """

    name: str
    label: str
    kind: str
    style: dict[str, Any]
    prompts: Sequence[PromptTimes]


def speedup_rows(rows: Sequence[Row]) -> go.Figure:
    """The rows, the first on top.

    Args:
        rows: At least one.
    """
    drawn = figure(
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
    break_even(drawn, "x")
    for kind in dict.fromkeys(row.kind for row in rows):
        some = [(y, row) for y, row in enumerate(rows) if row.kind == kind]
        _add_prompts(drawn, some)
        _add_totals(drawn, some)
    return drawn


def _add_prompts(drawn: go.Figure, rows: Sequence[tuple[int, Row]]) -> None:
    dots = [(y + 0.22, prompt) for y, row in rows for prompt in row.prompts]
    style = rows[0][1].style
    drawn.add_trace(
        go.Scatter(
            x=[speedup_of_prompt(prompt) for _, prompt in dots],
            y=[y for y, _ in dots],
            mode="markers",
            marker={"symbol": f"{style['symbol']}-open", "color": style["color"], "size": 6, "opacity": 0.75},
            showlegend=False,
            text=[
                f"prompt {prompt.prompt}: {prompt.plain_seconds:.2f} s plain, {prompt.draft_seconds:.2f} s drafting, "
                f"{prompt.accepted} of {prompt.drafted} tokens accepted"
                for _, prompt in dots
            ],
            hovertemplate="%{x:.2f}×<br>%{text}<extra></extra>",
        )
    )


def _add_totals(drawn: go.Figure, rows: Sequence[tuple[int, Row]]) -> None:
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
            marker=rows[0][1].style | {"size": 11},
            name=rows[0][1].kind,
            text=[f"{row.name}: {total}" for (_, row), total in zip(rows, totals, strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )
    )
