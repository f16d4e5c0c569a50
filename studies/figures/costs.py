"""What the parts of a step cost."""

from __future__ import annotations

import plotly.graph_objects as go

from layerskip.costs import Costs, StepCosts
from studies.figures.picture import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, Picture, Table, figure
from studies.view import StudyView

_ID, _TITLE = "costs", "What each sublayer costs here"


def costs(view: StudyView) -> Picture:
    """Parts of a draft step, and verification by width."""
    if view.costs is None:
        return Picture(_ID, _TITLE, "What the parts of a step cost was not measured yet.", None)
    relative = view.costs.relative()
    caption = (
        f"In units of one plain decoding step ({1000 * view.costs.plain_step:.1f} ms here), measured once by "
        f"differences between whole passes, after a text of {relative.context:.0f} tokens; all attention sublayers are "
        "taken to cost the same, and all MLPs. Below: v, what one pass over several tokens costs. Only the widths that "
        "are cheapest for some length are measured, and a pass is padded to the next of them."
    )
    measured = ((f"v of {k} tokens", relative.passes.cost(k)) for k in relative.passes.sublayers)
    rows = [*_amounts(relative.step, view.num_layers), *measured]
    table = Table(("part", "plain steps"), [(name, f"{cost:.4f}") for name, cost in rows])
    return Picture(_ID, _TITLE, caption, _drawn(relative, view.num_layers), table)


def _amounts(parts: StepCosts, layers: int) -> list[tuple[str, float]]:
    heads = [(f"head, {size} tokens", cost) for size, cost in sorted(parts.head.items()) if size]
    return [
        ("one attention", parts.attention),
        ("one MLP", parts.mlp),
        ("one bridge", parts.bridge),
        (f"all {layers} attention", layers * parts.attention),
        (f"all {layers} MLP", layers * parts.mlp),
        ("head, all tokens", parts.head[0]),
        *heads,
        ("the rest", parts.fixed),
    ]


def _drawn(relative: Costs, layers: int) -> go.Figure:
    amounts, widths = _amounts(relative.step, layers), list(relative.passes.sublayers)
    rows, longest = len(amounts), max(cost for _, cost in amounts)
    drawn = figure(
        height=30 * rows + 330,
        # Room for the labels behind the bars.
        xaxis={"title": {"text": "plain steps"}, "range": [0, 1.2 * longest], "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "domain": [0.47, 1], "showgrid": False},
        xaxis2={"title": {"text": "tokens in a pass"}, "anchor": "y2", "tickvals": widths},
        yaxis2={"title": {"text": "v (plain steps)"}, "domain": [0, 0.33], "rangemode": "tozero", "anchor": "x2"},
        showlegend=False,
    )
    drawn.add_trace(
        go.Bar(
            x=[cost for _, cost in amounts],
            y=[name for name, _ in amounts],
            orientation="h",
            marker={"color": [_colour(name) for name, _ in amounts]},
            text=[f"{cost:.1%}" for _, cost in amounts],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.2%} of a plain step<extra></extra>",
        )
    )
    widest = max(widths)
    needed = list(range(1, widest + 1))
    drawn.add_trace(
        go.Scatter(
            x=needed,
            y=[relative.verification(k) for k in needed],
            xaxis="x2",
            yaxis="y2",
            mode="lines",
            line={"shape": "vh", "color": GREY, "width": 1.5},
            hovertemplate="%{x} tokens: %{y:.2f} plain steps<extra></extra>",
        )
    )
    marker = {"symbol": "square", "color": PURPLE, "size": 9, "line": {"color": BLACK, "width": 0.5}}
    drawn.add_trace(
        go.Scatter(
            x=widths,
            y=[relative.passes.cost(width) for width in widths],
            xaxis="x2",
            yaxis="y2",
            mode="markers",
            marker=marker,
            hoverinfo="skip",
        )
    )
    return drawn


def _colour(part: str) -> str:
    kinds = {"attention": BLUE, "MLP": ORANGE, "bridge": SKY, "head": GREEN}
    return next((colour for kind, colour in kinds.items() if kind in part), GREY)
