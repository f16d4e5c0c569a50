"""Pictures of a comparison of several ways to decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studies.comparison import COLUMNS, Comparison, Entry, table
from studies.figures.picture import BLUE, GREEN, GREY, PALE, VERMILION, Picture, Table, figure, times
from studies.figures.speedup_rows import Row, speedup_rows
from studies.statistics import speedup_of_prompt

_KINDS: dict[str, dict[str, Any]] = {
    "faster": {"symbol": "square", "color": GREEN},
    "not shown to be faster": {"symbol": "circle", "color": GREY},
    "another output": {"symbol": "diamond", "color": VERMILION},
}


def compared(comparison: Comparison) -> list[Picture]:
    """All pictures of a comparison, in the order in which they are read."""
    return [_figures(comparison), _speedups(comparison), _times(comparison)]


def _figures(comparison: Comparison) -> Picture:
    columns, rows = table(comparison)
    said = "; ".join(f"{name}: {COLUMNS[name]}" for name in columns if name)
    missing = "".join(f" {name} did not take part: {reason}." for name, reason in comparison.left_out.items())
    return Picture("figures", "All figures", f"{said}.{missing}", None, Table(columns, rows))


def _speedups(comparison: Comparison) -> Picture:
    caption = (
        "Small marks are single prompts, with the medians of their repeats; the large mark is their total, with its "
        "95 % interval from resampling prompts. An interval that crosses 1× has not shown a gain. What stands here "
        "holds for these prompts; the best of many is a little flattered by chance."
    )
    others = comparison.entries[1:]
    if not others:
        return Picture("speedups", "Speedup over plain decoding", "Nothing but plain decoding took part.", None)
    rows = [
        Row(one.name, _broken(one.name), kind, _KINDS[kind], one.prompts) for one in others for kind in [_kind(one)]
    ]
    cells = [(one.name, prompt.prompt, times(speedup_of_prompt(prompt))) for one in others for prompt in one.prompts]
    drawn = speedup_rows(rows)
    return Picture("speedups", "Speedup over plain decoding", caption, drawn, Table(("", "prompt", "speedup"), cells))


def _kind(one: Entry) -> str:
    if one.different:
        return "another output"
    return "faster" if one.pays else "not shown to be faster"


def _times(comparison: Comparison) -> Picture:
    caption = (
        "Milliseconds for each new token, over all prompts and prefill included, in the median over the repeats; blue "
        "is what goes into drafting. The rest is passes of the target model, fewer the more of a draft stands."
    )
    entries = comparison.entries
    names = [_broken(one.name) for one in entries]
    each = [1000 / one.tokens_per_second for one in entries]
    drafting = [one.draft_share * whole for one, whole in zip(entries, each, strict=True)]
    rest = [whole - draft for whole, draft in zip(each, drafting, strict=True)]
    drawn = figure(
        height=max(46 * len(entries) + 130, 300),
        barmode="stack",
        xaxis={"title": {"text": "ms for each token"}},
        yaxis={"autorange": "reversed", "showgrid": False},
    )
    for name, values, color in (("drafting", drafting, BLUE), ("target model", rest, PALE)):
        drawn.add_bar(
            x=values,
            y=names,
            orientation="h",
            name=name,
            marker={"color": color, "line": {"color": GREY, "width": 0.7}},
            hovertemplate="%{y}: %{x:.1f} ms<extra>" + name + "</extra>",
        )
    return Picture("times", "Where a token's time goes", caption, drawn, _table_of_times(entries, drafting, rest))


def _table_of_times(entries: Sequence[Entry], drafting: Sequence[float], rest: Sequence[float]) -> Table:
    rows = [(one.name, f"{a:.1f} ms", f"{b:.1f} ms") for one, a, b in zip(entries, drafting, rest, strict=True)]
    return Table(("", "drafting", "target model"), rows)


def _broken(name: str) -> str:
    """A name in several lines where it is long, so that a narrow page has room for the figure."""
    return name.replace(" (", "<br>(").replace(" + ", "<br>+ ").replace("transformers ", "transformers<br>")
