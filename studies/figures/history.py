"""How a search went, and who proposed what."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import accumulate

import plotly.graph_objects as go

from studies.figures.picture import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    MEASURED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Picture,
    Table,
    break_even,
    figure,
    times,
)
from studies.view import StudyView, TrialSummary

_ID, _TITLE = "history", "History"
# Told apart by shape, and by colour as far as there are colours.
# Neither diamonds nor squares, which are measured wherever they are.
_SYMBOLS = ("circle-open", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hourglass", "bowtie")
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK, VERMILION, GREY)
_REPEATED = "interrupted trial"


def history(view: StudyView) -> Picture:
    """Every trial's speedup in order, by who proposed it, with the best so far."""
    if not view.tried:
        return Picture(_ID, _TITLE, "No trial is finished yet.", None)
    caption = (
        "Trials in their order, by who proposed them: warm starts first, then the sampler. Diamonds were decoded for "
        "real, hollow ones given up after some prompts; all other marks are predictions. The lines are the best "
        "predicted and the best measured so far."
    )
    if view.measured and view.correction != 1:
        caption += f" Measured speedups were {view.correction:.2f} times the predicted ones (median)."
    return Picture(_ID, _TITLE, caption, _drawn(view), _table(view.tried))


def proposer(source: str) -> str:
    """The family of a source: what stands before its colon, without numbers of trials."""
    family = source.partition(":")[0]
    return _REPEATED if family.startswith(_REPEATED) else family


def _drawn(view: StudyView) -> go.Figure:
    last = view.tried[-1].number
    drawn = figure(
        height=560,
        xaxis={"title": {"text": "trial"}, "range": [-0.02 * last - 0.5, 1.02 * last + 0.5]},
        yaxis={"title": {"text": "speedup"}, "ticksuffix": "×"},
        legend={"y": -0.16, "yanchor": "top"},
    )
    break_even(drawn, "y")
    predicted = [one for one in view.tried if one.basis == "predicted"]
    families: dict[str, list[TrialSummary]] = {}
    for one in predicted:
        families.setdefault(proposer(one.source), []).append(one)
    most_first = sorted(families.items(), key=lambda family: -len(family[1]))
    for number, (family, ones) in enumerate(most_first):
        symbol, colour = _SYMBOLS[number % len(_SYMBOLS)], _COLOURS[number % len(_COLOURS)]
        _add(drawn, ones, escape(family), {"symbol": symbol, "color": colour, "size": 7})
    _add_best(drawn, predicted, "best predicted so far", (BLUE, "solid"), last)
    # A hopeless one has the speedup of a few prompts, which may be easy ones.
    whole = [one for one in view.measured if not one.stopped]
    _add_best(drawn, whole, "best measured so far", (VERMILION, "dash"), last)
    _add(drawn, whole, "measured", MEASURED)
    stopped = MEASURED | {"symbol": "diamond-open"}
    _add(drawn, [one for one in view.measured if one.stopped], "measured, stopped early", stopped)
    return drawn


def _add(drawn: go.Figure, ones: Sequence[TrialSummary], name: str, marker: dict[str, object]) -> None:
    if not ones:
        return
    drawn.add_trace(
        go.Scatter(
            x=[one.number for one in ones],
            y=[one.speedup.value for one in ones],
            mode="markers",
            marker=marker,
            name=name,
            text=[
                f"trial {one.number}: {times(one.speedup.value)} {one.basis}<br>{escape(one.source)}<br>"
                f"{one.config.skip_set}"
                for one in ones
            ],
            hovertemplate="%{text}<extra></extra>",
        )
    )


def _add_best(drawn: go.Figure, ones: Sequence[TrialSummary], name: str, line: tuple[str, str], last: int) -> None:
    if not ones:
        return
    colour, dash = line
    best = list(accumulate((one.speedup.value for one in ones), max))
    drawn.add_trace(
        go.Scatter(
            x=[*(one.number for one in ones), last],
            y=[*best, best[-1]],
            mode="lines",
            line={"color": colour, "shape": "hv", "width": 1.5, "dash": dash},
            name=name,
            hoverinfo="skip",
        )
    )


def _table(tried: Sequence[TrialSummary]) -> Table:
    return Table(
        ("trial", "speedup", "basis", "proposed by", "left out", "draft"),
        [
            (
                str(one.number),
                times(one.speedup.value),
                one.basis,
                one.source,
                str(one.config.skip_set),
                one.config.details,
            )
            for one in tried
        ],
    )
