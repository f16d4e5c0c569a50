"""What leaving out each sublayer does to acceptance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from studies.acceptance_model import LEAST_CANDIDATES, LearnedAcceptance, learned_acceptance
from studies.figures.picture import BLACK, BLUE, GREY, ORANGE, Picture, Table, figure, percent
from studies.view import StudyView

_ID, _TITLE = "sublayers", "What each sublayer does for acceptance"
_KINDS = (("attention", BLUE), ("MLP", ORANGE))
_CAPTION = (
    "Acceptance rate α of a draft that leaves out this one sublayer and nothing else: low means that it is needed. "
)
_ALONE = "Diamonds were looked at directly, on a few texts. "
_LEARNED = (
    "Circles are learned from all candidates, which leave out many sublayers at once: a ridge regression in which "
    "damages add up, bridges and draft vocabularies accounted for, with 95 % intervals. Where damages do not add up, "
    "it is wrong by more than its interval"
)


def sublayers(view: StudyView) -> Picture:
    """Acceptance without each sublayer, looked at directly and learned from all candidates."""
    learned = learned_acceptance({one.config: one.acceptance for one in view.seen if one.acceptance is not None})
    if not learned and not view.alone:
        return Picture(_ID, _TITLE, f"This needs at least {LEAST_CANDIDATES} candidates.", None)
    caption = _CAPTION + _ALONE * bool(view.alone)
    if learned:
        caption += _LEARNED + ("; believe the diamonds." if view.alone else ".")
    return Picture(_ID, _TITLE, caption, _drawn(view.alone, learned, view.num_layers), _table(view, learned))


def _drawn(alone: Mapping[int, float], learned: Mapping[int, LearnedAcceptance], num_layers: int) -> go.Figure:
    drawn = figure(
        height=520,
        xaxis={"title": {"text": "layer"}, "anchor": "y2", "range": [-0.7, num_layers - 0.3]},
        yaxis={"title": {"text": "without attention"}, "domain": [0.54, 1], "rangemode": "tozero", "tickformat": ".0%"},
        yaxis2={"title": {"text": "without MLP"}, "domain": [0, 0.46], "rangemode": "tozero", "tickformat": ".0%"},
    )
    # The same on both axes, so that they can be compared.
    lowest = min([*alone.values(), *(one.low for one in learned.values())])
    bounds = [max(min(lowest - 0.05, 0.8), -0.02), 1.03]
    drawn.update_yaxes(range=bounds)
    for kind, (name, colour) in enumerate(_KINDS):
        axis = "y2" if kind else "y"
        _add_learned(drawn, {i // 2: one for i, one in learned.items() if i % 2 == kind}, name, axis)
        _add_alone(drawn, {i // 2: rate for i, rate in alone.items() if i % 2 == kind}, name, axis, colour)
    return drawn


def _add_learned(drawn: go.Figure, rates: Mapping[int, LearnedAcceptance], name: str, axis: str) -> None:
    if not rates:
        return
    drawn.add_trace(
        go.Scatter(
            x=list(rates),
            y=[one.value for one in rates.values()],
            error_y={
                "array": [one.high - one.value for one in rates.values()],
                "arrayminus": [one.value - one.low for one in rates.values()],
                "color": GREY,
                "thickness": 1,
                "width": 0,
            },
            mode="markers",
            marker={"symbol": "circle-open", "color": BLACK, "size": 5},
            yaxis=axis,
            name="learned from all candidates",
            legendgroup="learned",
            showlegend=axis == "y",
            hovertemplate=f"{name} of layer %{{x}}: %{{y:.1%}} learned<extra></extra>",
        )
    )


def _add_alone(drawn: go.Figure, rates: Mapping[int, float], name: str, axis: str, colour: str) -> None:
    if not rates:
        return
    drawn.add_trace(
        go.Scatter(
            x=list(rates),
            y=list(rates.values()),
            mode="markers",
            marker={"symbol": "diamond", "color": colour, "size": 8, "line": {"color": "white", "width": 0.5}},
            yaxis=axis,
            name=f"{name} looked at alone",
            hovertemplate=f"{name} of layer %{{x}}: %{{y:.1%}} alone<extra></extra>",
        )
    )


def _table(view: StudyView, learned: Mapping[int, LearnedAcceptance]) -> Table:
    rows: list[Sequence[str]] = []
    for i in range(2 * view.num_layers):
        one = learned.get(i)
        interval = f"{one.low:.1%} to {one.high:.1%}" if one else ""
        kind, _ = _KINDS[i % 2]
        rows.append((str(i // 2), kind, percent(view.alone.get(i)), percent(one.value if one else None), interval))
    return Table(("layer", "sublayer", "α alone", "α learned", "95 %"), rows)
