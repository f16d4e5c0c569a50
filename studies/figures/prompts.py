"""The speedup of every prompt that was decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from studies.figures.picture import HELD_OUT, MEASURED, Picture, Table, break_even, figure, times
from studies.records import MeasurementRecord
from studies.speedups import speedup_of_all, speedup_of_prompt
from studies.view import StudyView

_ID, _TITLE = "prompts", "Speedup of each prompt"
_STYLES: Mapping[str, dict[str, Any]] = {"held-out": HELD_OUT, "search": MEASURED}
Group = tuple[int, str, Sequence[MeasurementRecord]]


def prompts(view: StudyView, count: int) -> Picture:
    """The prompts of each measured candidate, with the speedup of all of them together.

    Args:
        view: The study.
        count: Most rows.
    """
    groups = _groups(view)
    if not groups:
        return Picture(_ID, _TITLE, "No prompt was decoded for real yet.", None)
    shown = groups[:count]
    caption = (
        "Small marks are single prompts, each decoded plainly and with the draft in turn; the large mark is their "
        "total, with its 95 % interval from resampling prompts. Green squares are prompts that the search never saw."
    )
    if len(groups) > count:
        caption += f" The best {count} of {len(groups)} are drawn; the table has all."
    return Picture(_ID, _TITLE, caption, _drawn(shown), _table(groups))


def _groups(view: StudyView) -> list[Group]:
    """Held-out ones first, best first within each."""
    groups: dict[tuple[int, str], list[MeasurementRecord]] = {}
    for record in view.measurements:
        groups.setdefault((record.trial, record.prompt_set), []).append(record)
    return sorted(
        ((*key, records) for key, records in groups.items()),
        key=lambda group: (group[1] != "held-out", -speedup_of_all(group[2]).value),
    )


def _drawn(groups: Sequence[Group]) -> go.Figure:
    drawn = figure(
        height=46 * len(groups) + 130,
        xaxis={"title": {"text": "speedup"}, "ticksuffix": "×"},
        yaxis={
            "autorange": False,
            "range": [len(groups) - 0.5, -0.6],
            "showgrid": False,
            "tickvals": list(range(len(groups))),
            "ticktext": [f"trial {trial}<br>{prompt_set}" for trial, prompt_set, _ in groups],
        },
    )
    break_even(drawn, "x")
    for prompt_set, style in _STYLES.items():
        rows = [(y, trial, records) for y, (trial, of, records) in enumerate(groups) if of == prompt_set]
        if rows:
            _add_prompts(drawn, rows, style)
            _add_totals(drawn, rows, f"{prompt_set} prompts", style)
    return drawn


def _add_prompts(
    drawn: go.Figure, rows: Sequence[tuple[int, int, Sequence[MeasurementRecord]]], style: dict[str, Any]
) -> None:
    dots = [(y + 0.22, record) for y, _, records in rows for record in records]
    drawn.add_trace(
        go.Scatter(
            x=[speedup_of_prompt(record) for _, record in dots],
            y=[y for y, _ in dots],
            mode="markers",
            marker={"symbol": f"{style['symbol']}-open", "color": style["color"], "size": 6, "opacity": 0.75},
            showlegend=False,
            text=[
                f"prompt {record.prompt}: {record.plain_seconds:.2f} s plain, {record.draft_seconds:.2f} s drafting, "
                f"{record.accepted} of {record.drafted} tokens accepted"
                for _, record in dots
            ],
            hovertemplate="%{x:.2f}×<br>%{text}<extra></extra>",
        )
    )


def _add_totals(
    drawn: go.Figure, rows: Sequence[tuple[int, int, Sequence[MeasurementRecord]]], name: str, style: dict[str, Any]
) -> None:
    totals = [speedup_of_all(records) for _, _, records in rows]
    drawn.add_trace(
        go.Scatter(
            x=[total.value for total in totals],
            y=[y - 0.12 for y, _, _ in rows],
            error_x={
                "array": [total.high - total.value for total in totals],
                "arrayminus": [total.value - total.low for total in totals],
                "thickness": 2,
                "width": 5,
            },
            mode="markers",
            marker=style | {"size": 11},
            name=name,
            text=[f"trial {trial}: {total}" for (_, trial, _), total in zip(rows, totals, strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )
    )


def _table(groups: Sequence[Group]) -> Table:
    rows: list[Sequence[str]] = []
    for trial, prompt_set, records in groups:
        total = speedup_of_all(records)
        interval = f"{total.low:.2f} to {total.high:.2f}" if total.low < total.high else ""
        rows.append((str(trial), prompt_set, f"all {len(records)}", times(total.value), interval))
        rows += [(str(trial), prompt_set, one.prompt, times(speedup_of_prompt(one)), "") for one in records]
    return Table(("trial", "prompts", "prompt", "speedup", "95 %"), rows)
