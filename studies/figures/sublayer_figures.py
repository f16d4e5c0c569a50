"""Figures that explain a study's speedups: acceptance rates, and what sublayers and the parts of a step cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from layerskip.costs import Costs, StepCosts, best_speedup
from studies.acceptance_model import LEAST_CANDIDATES, LearnedAcceptance, learned_acceptance
from studies.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    MEASURED,
    ORANGE,
    PREDICTED,
    PURPLE,
    SKY,
    DataTable,
    Picture,
    add_break_even,
    empty_figure,
    format_percent,
    format_speedup,
)
from studies.view import StudyView, TrialSummary

# Speedup by acceptance rate.
_FORMULA_CAPTION = (
    "Each point is a candidate: its one-step acceptance rate α and its speedup. Lines are the ideal "
    "(1 − α^(γ+1)) ÷ (1 − α) ÷ (γ·c + v) at the best draft length γ (Leviathan et al., arXiv 2211.17192). Points leave "
    "their line where prompts differ, where low confidence ends drafts early or prevents them, and where prefill takes "
    "its share; the lines are "
)
_COSTS = (0.25, 0.5, 0.75)  # if the study has no draft costs
_LEAST_APART = 0.08  # lines of costs that are closer together cannot be told apart
_OUTLINE = {"line": {"color": BLACK, "width": 0.7}}
_DEFAULT_LONGEST = 8  # no draft length beyond is worth drawing


def acceptance(view: StudyView) -> Picture:
    """Speedup by acceptance rate of predicted and measured candidates, and the ideal for some draft costs."""
    title = "Speedup by acceptance rate"
    shown = [trial for trial in (*view.evaluated, *view.measured) if trial.acceptance is not None]
    if not shown:
        return Picture("acceptance", title, "No candidate was evaluated yet.", None)
    lines = "solid with v as measured here, dotted with v = 1, where verifying costs no more than one plain step."
    caption = _FORMULA_CAPTION + (lines if view.costs else "for v = 1, as verification was not measured.")
    if any(trial.draft_cost is not None for trial in shown):
        caption += " Colour is c, the cost of a draft step in units of a plain step."
    return Picture("acceptance", title, caption, _draw_acceptance(view, shown), _acceptance_table(shown))


def _draw_acceptance(view: StudyView, shown: Sequence[TrialSummary]) -> go.Figure:
    speedups = [trial.speedup.value for trial in shown]
    lowest, highest = min(1.0, *speedups), max(1.0, *speedups)
    rates = [float(trial.acceptance or 0) for trial in shown]
    left = max(min(*rates, 0.9) - 0.03, 0.0)
    colour_bar = {
        "title": {"text": "c, cost of a draft step", "side": "top"},
        "orientation": "h",
        "thickness": 10,
        "y": -0.2,
        "yanchor": "top",
    }
    drawn = empty_figure(
        height=520,
        # Room for the names of lines at their right ends.
        xaxis={"title": {"text": "acceptance rate α"}, "range": [left, 1 + 0.2 * (1 - left)], "tickformat": ".0%"},
        yaxis={"title": {"text": "speedup"}, "range": [0.8 * lowest, 1.35 * highest], "ticksuffix": "×"},
        coloraxis={"colorscale": "Cividis", "colorbar": colour_bar},
    )
    costs = [trial.draft_cost for trial in shown if trial.draft_cost is not None]
    if costs:
        drawn.layout.coloraxis.cmin, drawn.layout.coloraxis.cmax = min(costs), max(max(costs), min(costs) + 0.01)
    add_break_even(drawn, "y")
    _add_ideals(drawn, view, _typical(costs), left)
    for basis, marker in (("predicted", PREDICTED), ("measured", MEASURED)):
        _add_points(drawn, [trial for trial in shown if trial.basis == basis], basis, marker)
    return drawn


def _typical(costs: Sequence[float]) -> Sequence[float]:
    """The lowest, highest and median draft cost, as far as they differ."""
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
                _label_line(drawn, rates, speedups, f"c = {cost:g}", top, number)


def _label_line(
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


def _add_points(drawn: go.Figure, trials: Sequence[TrialSummary], basis: str, marker: dict[str, Any]) -> None:
    if not trials:
        return
    if any(trial.draft_cost is not None for trial in trials):
        # The legend cannot take its colour from a scale: it gets an entry of its own.
        marker = marker | {"symbol": marker["symbol"].removesuffix("-open"), "color": "white"} | _OUTLINE
        drawn.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=basis))
        marker = marker | {"color": [trial.draft_cost for trial in trials], "coloraxis": "coloraxis"}
    drawn.add_trace(
        go.Scatter(
            x=[trial.acceptance for trial in trials],
            y=[trial.speedup.value for trial in trials],
            mode="markers",
            marker=marker,
            name=basis,
            showlegend="coloraxis" not in marker,
            text=[_description(trial) for trial in trials],
            hovertemplate="%{text}<extra></extra>",
        )
    )


def _description(trial: TrialSummary) -> str:
    speedup, rate = format_speedup(trial.speedup.value), format_percent(trial.acceptance)
    cost = "" if trial.draft_cost is None else f", c = {trial.draft_cost:.2f}"
    return f"trial {trial.number}: {speedup} {trial.basis}, α = {rate}{cost}<br>{trial.config.skip_set}"


def _acceptance_table(shown: Sequence[TrialSummary]) -> DataTable:
    return DataTable(
        ("trial", "basis", "α", "speedup", "c"),
        [
            (
                str(trial.number),
                trial.basis,
                format_percent(trial.acceptance),
                format_speedup(trial.speedup.value),
                "" if trial.draft_cost is None else f"{trial.draft_cost:.3f}",
            )
            for trial in sorted(shown, key=lambda trial: trial.number)
        ],
    )


# Acceptance rate without each sublayer.
_KINDS = (("attention", BLUE), ("MLP", ORANGE))
_SUBLAYERS_CAPTION = (
    "Acceptance rate α of a draft that skips this sublayer and nothing else: low means that the sublayer is needed. "
)
_EVALUATED_CAPTION = "Diamonds were evaluated directly, on a few texts. "
_ESTIMATED_CAPTION = (
    "Circles are estimated from all candidates, which skip many sublayers at once: a ridge regression in which "
    "effects add up, bridges and draft vocabularies accounted for, with 95 % intervals. Where effects do not add up, "
    "it is wrong by more than its interval"
)


def sublayers(view: StudyView) -> Picture:
    """Acceptance rate without each sublayer, evaluated directly and estimated from all candidates."""
    title = "Acceptance rate without each sublayer"
    rates = {trial.config: trial.acceptance for trial in view.evaluated if trial.acceptance is not None}
    evaluated, estimated = view.single_sublayer_acceptance, learned_acceptance(rates)
    if not estimated and not evaluated:
        return Picture("sublayers", title, f"This needs at least {LEAST_CANDIDATES} candidates.", None)
    caption = _SUBLAYERS_CAPTION + _EVALUATED_CAPTION * bool(evaluated)
    if estimated:
        caption += _ESTIMATED_CAPTION + ("; trust the diamonds." if evaluated else ".")
    drawn = _draw_sublayers(evaluated, estimated, view.num_layers)
    return Picture("sublayers", title, caption, drawn, _sublayers_table(view, estimated))


def _draw_sublayers(
    evaluated: Mapping[int, float], estimated: Mapping[int, LearnedAcceptance], num_layers: int
) -> go.Figure:
    drawn = empty_figure(
        height=520,
        xaxis={"title": {"text": "layer"}, "anchor": "y2", "range": [-0.7, num_layers - 0.3]},
        yaxis={"title": {"text": "without attention"}, "domain": [0.54, 1], "rangemode": "tozero", "tickformat": ".0%"},
        yaxis2={"title": {"text": "without MLP"}, "domain": [0, 0.46], "rangemode": "tozero", "tickformat": ".0%"},
    )
    # The same on both axes, so that they can be compared.
    lowest = min([*evaluated.values(), *(estimate.low for estimate in estimated.values())])
    drawn.update_yaxes(range=[max(min(lowest - 0.05, 0.8), -0.02), 1.03])
    for kind, (name, colour) in enumerate(_KINDS):
        axis = "y2" if kind else "y"
        _add_estimated(drawn, {i // 2: e for i, e in estimated.items() if i % 2 == kind}, name, axis)
        _add_evaluated(drawn, {i // 2: rate for i, rate in evaluated.items() if i % 2 == kind}, name, axis, colour)
    return drawn


def _add_estimated(drawn: go.Figure, rates: Mapping[int, LearnedAcceptance], name: str, axis: str) -> None:
    if not rates:
        return
    drawn.add_trace(
        go.Scatter(
            x=list(rates),
            y=[rate.value for rate in rates.values()],
            error_y={
                "array": [rate.high - rate.value for rate in rates.values()],
                "arrayminus": [rate.value - rate.low for rate in rates.values()],
                "color": GREY,
                "thickness": 1,
                "width": 0,
            },
            mode="markers",
            marker={"symbol": "circle-open", "color": BLACK, "size": 5},
            yaxis=axis,
            name="estimated from all candidates",
            legendgroup="estimated",
            showlegend=axis == "y",
            hovertemplate=f"{name} of layer %{{x}}: %{{y:.1%}} estimated<extra></extra>",
        )
    )


def _add_evaluated(drawn: go.Figure, rates: Mapping[int, float], name: str, axis: str, colour: str) -> None:
    if not rates:
        return
    drawn.add_trace(
        go.Scatter(
            x=list(rates),
            y=list(rates.values()),
            mode="markers",
            marker={"symbol": "diamond", "color": colour, "size": 8, "line": {"color": "white", "width": 0.5}},
            yaxis=axis,
            name=f"{name} evaluated directly",
            hovertemplate=f"{name} of layer %{{x}}: %{{y:.1%}} evaluated<extra></extra>",
        )
    )


def _sublayers_table(view: StudyView, estimated: Mapping[int, LearnedAcceptance]) -> DataTable:
    rows: list[Sequence[str]] = []
    for i in range(2 * view.num_layers):
        estimate = estimated.get(i)
        rows.append(
            (
                str(i // 2),
                _KINDS[i % 2][0],
                format_percent(view.single_sublayer_acceptance.get(i)),
                format_percent(estimate.value if estimate else None),
                f"{estimate.low:.1%} to {estimate.high:.1%}" if estimate else "",
            )
        )
    return DataTable(("layer", "sublayer", "α evaluated", "α estimated", "95 %"), rows)


# Cost of each part of a step.
_PART_COLOURS = {"attention": BLUE, "MLP": ORANGE, "bridge": SKY, "head": GREEN}


def costs(view: StudyView) -> Picture:
    """The parts of a draft step, and verification by the number of tokens."""
    title = "Cost of each part of a step"
    if view.costs is None:
        return Picture("costs", title, "The costs of a step were not measured yet.", None)
    relative = view.costs.relative()
    caption = (
        f"In units of one plain decoding step ({1000 * view.costs.plain_step:.1f} ms here), measured once by "
        f"differences between whole passes, after a text of {relative.context:.0f} tokens; all attention sublayers are "
        "taken to cost the same, and all MLPs. Below: v, the cost of one pass over several tokens. Only the widths "
        "that are cheapest for some length are measured, and a pass is padded to the next of them."
    )
    amounts, verification = _amounts(relative.step, view.num_layers), _verification(relative)
    rows = [*amounts, *((f"v of {tokens} tokens", cost) for tokens, cost in verification.items())]
    data = DataTable(("part", "plain steps"), [(name, f"{cost:.4f}") for name, cost in rows])
    return Picture("costs", title, caption, _draw_costs(relative, amounts, verification), data)


def _verification(relative: Costs) -> dict[int, float]:
    """v of each measured width."""
    return {width: relative.passes.cost(width) for width in relative.passes.sublayers}


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


def _draw_costs(relative: Costs, amounts: Sequence[tuple[str, float]], verification: Mapping[int, float]) -> go.Figure:
    drawn = empty_figure(
        height=30 * len(amounts) + 330,
        # Room for the labels after the bars.
        xaxis={
            "title": {"text": "plain steps"},
            "range": [0, 1.2 * max(cost for _, cost in amounts)],
            "tickformat": ".0%",
        },
        yaxis={"autorange": "reversed", "domain": [0.47, 1], "showgrid": False},
        xaxis2={"title": {"text": "tokens in a pass"}, "anchor": "y2", "tickvals": list(verification)},
        yaxis2={"title": {"text": "v (plain steps)"}, "domain": [0, 0.33], "rangemode": "tozero", "anchor": "x2"},
        showlegend=False,
    )
    drawn.add_trace(
        go.Bar(
            x=[cost for _, cost in amounts],
            y=[name for name, _ in amounts],
            orientation="h",
            marker={"color": [_part_colour(name) for name, _ in amounts]},
            text=[f"{cost:.1%}" for _, cost in amounts],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.2%} of a plain step<extra></extra>",
        )
    )
    lengths = list(range(1, max(verification) + 1))
    lower = {"xaxis": "x2", "yaxis": "y2"}
    drawn.add_trace(
        go.Scatter(
            x=lengths,
            y=[relative.verification(tokens) for tokens in lengths],
            mode="lines",
            line={"shape": "vh", "color": GREY, "width": 1.5},
            hovertemplate="%{x} tokens: %{y:.2f} plain steps<extra></extra>",
            **lower,
        )
    )
    drawn.add_trace(
        go.Scatter(
            x=list(verification),
            y=list(verification.values()),
            mode="markers",
            marker={"symbol": "square", "color": PURPLE, "size": 9, "line": {"color": BLACK, "width": 0.5}},
            hoverinfo="skip",
            **lower,
        )
    )
    return drawn


def _part_colour(part: str) -> str:
    return next((colour for kind, colour in _PART_COLOURS.items() if kind in part), GREY)
