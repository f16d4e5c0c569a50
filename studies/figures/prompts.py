"""The speedup of every prompt that was decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from studies.figures.picture import HELD_OUT, MEASURED, Picture, Table, times
from studies.figures.speedup_rows import Row, speedup_rows
from studies.records import MeasurementRecord
from studies.statistics import speedup_of_all, speedup_of_prompt
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
    return speedup_rows(
        [
            Row(
                name=f"trial {trial}",
                label=f"trial {trial}<br>{prompt_set}",
                kind=f"{prompt_set} prompts",
                style=_STYLES[prompt_set],
                prompts=records,
            )
            for trial, prompt_set, records in groups
        ]
    )


def _table(groups: Sequence[Group]) -> Table:
    rows: list[Sequence[str]] = []
    for trial, prompt_set, records in groups:
        total = speedup_of_all(records)
        interval = f"{total.low:.2f} to {total.high:.2f}" if total.low < total.high else ""
        rows.append((str(trial), prompt_set, f"all {len(records)}", times(total.value), interval))
        rows += [(str(trial), prompt_set, one.prompt, times(speedup_of_prompt(one)), "") for one in records]
    return Table(("trial", "prompts", "prompt", "speedup", "95 %"), rows)
