"""Figures of a comparison of decoding methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from studies.comparison import COLUMNS, Comparison, Entry, category_table, table
from studies.figures.style import (
    BLUE,
    GREEN,
    GREY,
    PALE,
    VERMILION,
    DataTable,
    Picture,
    SpeedupRow,
    add_break_even,
    empty_figure,
    format_speedup,
    speedup_rows,
)
from studies.statistics import speedup_of_prompt

_MARKERS: dict[str, dict[str, Any]] = {
    "faster": {"symbol": "square", "color": GREEN},
    "not shown to be faster": {"symbol": "circle", "color": GREY},
    "different output": {"symbol": "diamond", "color": VERMILION},
}


def comparison_figures(comparison: Comparison) -> list[Picture]:
    """All figures of a comparison, in reading order."""
    by_category = [_by_category(comparison)] if comparison.categories else []
    return [_table_of_figures(comparison), _speedups(comparison), *by_category, _time_per_token(comparison)]


def _table_of_figures(comparison: Comparison) -> Picture:
    columns, rows = table(comparison)
    legend = "; ".join(f"{name}: {COLUMNS[name]}" for name in columns if name)
    missing = "".join(f" {name} did not take part: {reason}." for name, reason in comparison.left_out.items())
    return Picture("figures", "All figures", f"{legend}.{missing}", None, DataTable(columns, rows))


def _speedups(comparison: Comparison) -> Picture:
    caption = (
        "Small marks are single prompts, by their fastest repeats; the large mark is their total, with its "
        "95 % interval from resampling prompts. An interval that crosses 1× has not shown a gain. The figures hold for "
        "these prompts; the best of many methods is slightly overestimated."
    )
    entries = comparison.entries[1:]
    if not entries:
        return Picture("speedups", "Speedup over plain decoding", "Nothing but plain decoding took part.", None)
    rows = [SpeedupRow(e.name, _wrapped(e.name), _kind(e), _MARKERS[_kind(e)], e.prompts) for e in entries]
    cells = [
        (entry.name, prompt.prompt, format_speedup(speedup_of_prompt(prompt)))
        for entry in entries
        for prompt in entry.prompts
    ]
    data = DataTable(("", "prompt", "speedup"), cells)
    return Picture("speedups", "Speedup over plain decoding", caption, speedup_rows(rows), data)


def _by_category(comparison: Comparison) -> Picture:
    title = "Speedup by category"
    caption = "Of each method on the questions of each category, against layerskip's plain decoding."
    columns, rows = category_table(comparison)
    drawn = empty_figure(
        height=max(26 * len(columns) * max(len(comparison.entries) - 1, 1) + 130, 300),
        barmode="group",
        xaxis={"title": {"text": "speedup"}},
        yaxis={"autorange": "reversed"},
    )
    add_break_even(drawn, "x")
    for entry in comparison.entries[1:]:
        figures = comparison.by_category[entry.name]
        drawn.add_trace(
            go.Bar(
                x=[each.speedup.value for each in figures],
                y=[each.category for each in figures],
                orientation="h",
                name=entry.name,
                hovertemplate="%{y}: %{x:.2f}×<extra></extra>",
            )
        )
    return Picture("categories", title, caption, drawn, DataTable(columns, rows))


def _kind(entry: Entry) -> str:
    if entry.different:
        return "different output"
    return "faster" if entry.pays else "not shown to be faster"


def _time_per_token(comparison: Comparison) -> Picture:
    caption = (
        "Milliseconds per new token, over all prompts and prefill included, by the fastest repeats; blue "
        "is drafting. The rest is passes of the target model: the more drafted tokens are accepted, the fewer."
    )
    entries = comparison.entries
    totals = [1000 / entry.tokens_per_second for entry in entries]
    drafting = [entry.draft_share * total for entry, total in zip(entries, totals, strict=True)]
    target = [total - draft for total, draft in zip(totals, drafting, strict=True)]
    drawn = empty_figure(
        height=max(46 * len(entries) + 130, 300),
        barmode="stack",
        xaxis={"title": {"text": "ms per token"}},
        yaxis={"autorange": "reversed", "showgrid": False},
    )
    for name, values, color in (("drafting", drafting, BLUE), ("target model", target, PALE)):
        drawn.add_bar(
            x=values,
            y=[_wrapped(entry.name) for entry in entries],
            orientation="h",
            name=name,
            marker={"color": color, "line": {"color": GREY, "width": 0.7}},
            hovertemplate="%{y}: %{x:.1f} ms<extra>" + name + "</extra>",
        )
    return Picture("times", "Time per token", caption, drawn, _table_of_times(entries, drafting, target))


def _table_of_times(entries: Sequence[Entry], drafting: Sequence[float], target: Sequence[float]) -> DataTable:
    rows = [(entry.name, f"{a:.1f} ms", f"{b:.1f} ms") for entry, a, b in zip(entries, drafting, target, strict=True)]
    return DataTable(("", "drafting", "target model"), rows)


def _wrapped(name: str) -> str:
    """A long name in several lines, so that a narrow page has room for the figure."""
    return name.replace(" (", "<br>(").replace(" + ", "<br>+ ").replace("transformers ", "transformers<br>")
