"""Speedup against acceptance, with what the formula of speculative decoding allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from layerskip.costs import best_speedup
from studies.figures.picture import BLACK, GREY, MEASURED, PREDICTED, Picture, Table, break_even, figure, percent, times
from studies.view import StudyView, TrialSummary

_ID, _TITLE = "acceptance", "Speedup against acceptance"
_CAPTION = (
    "Each point is a candidate: its one-step acceptance rate α and its speedup. Lines are the ideal "
    "(1 − α^(γ+1)) ÷ (1 − α) ÷ (γ·c + v) at the best draft length γ (Leviathan et al., arXiv 2211.17192). Points leave "
    "their line where prompts differ, where confidence ends drafts early or a gate skips them, and where prefill takes "
    "its share; the lines are "
)
_COSTS = (0.25, 0.5, 0.75)  # where the study does not say what its drafts cost
# Lines of costs that are closer together cannot be told apart.
_LEAST_APART = 0.08
_SCALE = "Cividis"
_OUTLINE = {"line": {"color": BLACK, "width": 0.7}}
# No draft length is worth drawing beyond this, whatever the search space.
_DEFAULT_LONGEST = 8


def acceptance(view: StudyView) -> Picture:
    """Predicted and measured candidates, and the ideal for some draft costs."""
    shown = [one for one in (*view.seen, *view.measured) if one.acceptance is not None]
    if not shown:
        return Picture(_ID, _TITLE, "No candidate was looked at yet.", None)
    measured_v = view.costs is not None
    lines = "solid with v as measured here, dotted with v = 1, where verifying costs no more than one plain step."
    caption = _CAPTION + (lines if measured_v else "for v = 1, as verification was not measured.")
    if any(one.draft_cost is not None for one in shown):
        caption += " Colour is c, what one of its draft steps costs in units of a plain step."
    return Picture(_ID, _TITLE, caption, _drawn(view, shown), _table(shown))


def _drawn(view: StudyView, shown: Sequence[TrialSummary]) -> go.Figure:
    speedups = [one.speedup.value for one in shown]
    lowest, highest = min(1.0, *speedups), max(1.0, *speedups)
    rates = [float(one.acceptance or 0) for one in shown]
    left = max(min(*rates, 0.9) - 0.03, 0.0)
    drawn = figure(
        height=520,
        # Room for the names of lines at their right ends.
        xaxis={"title": {"text": "acceptance rate α"}, "range": [left, 1 + 0.2 * (1 - left)], "tickformat": ".0%"},
        yaxis={"title": {"text": "speedup"}, "range": [0.8 * lowest, 1.35 * highest], "ticksuffix": "×"},
        coloraxis={
            "colorscale": _SCALE,
            "colorbar": {
                "title": {"text": "c, cost of a draft step", "side": "top"},
                "orientation": "h",
                "thickness": 10,
                "y": -0.2,
                "yanchor": "top",
            },
        },
    )
    costs = [one.draft_cost for one in shown if one.draft_cost is not None]
    if costs:
        drawn.layout.coloraxis.cmin, drawn.layout.coloraxis.cmax = min(costs), max(max(costs), min(costs) + 0.01)
    break_even(drawn, "y")
    _add_ideals(drawn, view, _typical(costs), left)
    for basis, style in (("predicted", PREDICTED), ("measured", MEASURED)):
        _add_points(drawn, [one for one in shown if one.basis == basis], basis, style)
    return drawn


def _typical(costs: Sequence[float]) -> Sequence[float]:
    """A few costs of drafts, each once."""
    if not costs:
        return _COSTS
    typical: list[float] = []
    for cost in np.quantile(costs, (0, 1, 0.5)):
        if all(abs(cost - other) >= _LEAST_APART for other in typical):
            typical.append(round(float(cost), 2))
    return typical


def _add_ideals(drawn: go.Figure, view: StudyView, costs: Sequence[float], left: float) -> None:
    longest = int(view.context["space"].get("max_draft_length", _DEFAULT_LONGEST))
    rates = np.linspace(left, 1, 101).tolist()
    verifications: list[tuple[str, str, Callable[[int], float]]] = [("ideal, v = 1", "dot", lambda _: 1.0)]
    if view.costs is not None:
        verifications.insert(0, ("ideal, v as measured", "solid", view.costs.relative().verification))
    top = drawn.layout.yaxis.range[1]
    for name, dash, verifying in verifications:
        for number, cost in enumerate(costs):
            speedups = [best_speedup(rate, cost, verifying, longest) for rate in rates]
            drawn.add_trace(
                go.Scatter(
                    x=rates,
                    y=speedups,
                    mode="lines",
                    line={"color": GREY, "dash": dash, "width": 1.2},
                    name=name,
                    legendgroup=name,
                    showlegend=number == 0,
                    hovertemplate=f"{name}, c = {cost:g}: %{{y:.2f}}× at %{{x:.0%}}<extra></extra>",
                )
            )
            if dash == verifications[0][1]:
                _label(drawn, rates, speedups, f"c = {cost:g}", top, number)


def _label(
    drawn: go.Figure, rates: Sequence[float], speedups: Sequence[float], text: str, top: float, number: int
) -> None:
    """Name a line at its end, or where it leaves the figure: there lines are close, and each gets its own height."""
    leaves = next((i for i, speedup in enumerate(speedups) if speedup > top), None)
    at = len(rates) - 1 if leaves is None else leaves
    drawn.add_annotation(
        x=rates[at],
        y=min(speedups[at], top),
        text=text,
        showarrow=False,
        xanchor="left",
        yanchor="middle" if leaves is None else "top",
        xshift=3,
        yshift=0 if leaves is None else -14 * number,
        font={"size": 11, "color": BLACK},
    )


def _add_points(drawn: go.Figure, points: Sequence[TrialSummary], basis: str, style: dict[str, Any]) -> None:
    if not points:
        return
    marker = dict(style)
    if any(one.draft_cost is not None for one in points):
        # The legend cannot take its colour from a scale: it gets an entry of its own.
        marker |= {"symbol": style["symbol"].removesuffix("-open"), "color": "white"} | _OUTLINE
        drawn.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=basis))
        marker |= {"color": [one.draft_cost for one in points], "coloraxis": "coloraxis"}
    drawn.add_trace(
        go.Scatter(
            x=[one.acceptance for one in points],
            y=[one.speedup.value for one in points],
            mode="markers",
            marker=marker,
            name=basis,
            showlegend="coloraxis" not in marker,
            text=[_told(one) for one in points],
            hovertemplate="%{text}<extra></extra>",
        )
    )


def _told(one: TrialSummary) -> str:
    cost = "" if one.draft_cost is None else f", c = {one.draft_cost:.2f}"
    rate = percent(one.acceptance)
    return f"trial {one.number}: {times(one.speedup.value)} {one.basis}, α = {rate}{cost}<br>{one.config.skip_set}"


def _table(shown: Sequence[TrialSummary]) -> Table:
    return Table(
        ("trial", "basis", "α", "speedup", "c"),
        [
            (
                str(one.number),
                one.basis,
                percent(one.acceptance),
                times(one.speedup.value),
                "" if one.draft_cost is None else f"{one.draft_cost:.3f}",
            )
            for one in sorted(shown, key=lambda one: one.number)
        ],
    )
