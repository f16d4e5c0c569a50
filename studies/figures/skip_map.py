"""Which sublayers the best candidates leave out."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from studies.figures.picture import BLUE, ORANGE, PALE, Picture, Table, figure, percent, times
from studies.view import StudyView, TrialSummary

_ATTENTION, _MLP = 1, 2  # values of cells; 0 is kept
_ROWS = 3  # of each candidate: its name, attention, MLP
_ROW_PIXELS = 19
# With more layers, gaps between them would eat up the cells on a phone.
_MOST_LAYERS_WITH_GAPS = 48
_KINDS = ("attention", "MLP")


def skip_map(view: StudyView, count: int) -> Picture:
    """The best candidates, a row of layers for attention and one for MLP each.

    Args:
        view: The study.
        count: Most candidates to show.
    """
    best = view.ranked[:count]
    if not best:
        return Picture("skip-map", "What the best candidates leave out", "No candidate was looked at yet.", None)
    return Picture("skip-map", "What the best candidates leave out", _caption(view, best), _map(best), _table(best))


def _caption(view: StudyView, best: Sequence[TrialSummary]) -> str:
    said = "Coloured cells are left out while drafting. "
    if len(best) == 1:
        return f"{said}There is one candidate so far."
    said += "Best first: what was measured on held-out prompts, then the others by their measured or predicted speedup"
    if view.correction != 1:
        said += f" (for this order, predictions count {view.correction:.2f} times, as measurements were that much off)"
    return f"{said}. What was found hopeless and stopped comes last."


def _map(best: Sequence[TrialSummary]) -> go.Figure:
    layers = best[0].config.skip_set.num_layers
    gap = 1 if layers <= _MOST_LAYERS_WITH_GAPS else 0
    z: list[Sequence[int | None]] = []
    hover: list[list[str]] = []
    for one in best:
        masks = (one.config.skip_set.attention_mask, one.config.skip_set.mlp_mask)
        z += [[None] * layers, [_ATTENTION * skip for skip in masks[0]], [_MLP * skip for skip in masks[1]]]
        hover += [[""] * layers, *(_hover(one, kind, mask) for kind, mask in zip(_KINDS, masks, strict=True))]
    drawn = figure(
        height=_ROWS * _ROW_PIXELS * len(best) + 110,
        xaxis={"title": {"text": "layer"}, "showgrid": False, "range": [-0.5, layers - 0.5], "showline": False},
        yaxis={
            "autorange": "reversed",
            "showgrid": False,
            "showline": False,
            "ticks": "",
            "tickvals": [_ROWS * i + row for i in range(len(best)) for row in (1, 2)],
            "ticktext": ["attn", "MLP"] * len(best),
            "tickfont": {"size": 10},
        },
    )
    cells = go.Heatmap(
        x=list(range(layers)),
        y=list(range(_ROWS * len(best))),
        z=z,
        zmin=0,
        zmax=_MLP,
        xgap=gap,
        ygap=1,
        showscale=False,
    )
    cells.colorscale = [[0, PALE], [1 / 3, PALE], [1 / 3, BLUE], [2 / 3, BLUE], [2 / 3, ORANGE], [1, ORANGE]]
    cells.update(text=hover, hovertemplate="%{text}<extra></extra>", hoverongaps=False)
    drawn.add_trace(cells)
    for name, colour in (("attention left out", BLUE), ("MLP left out", ORANGE), ("kept", PALE)):
        marker = {"symbol": "square", "color": colour, "size": 12}
        drawn.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=marker))
    for i, one in enumerate(best):
        drawn.add_annotation(
            x=-0.5,
            y=_ROWS * i,
            text=f"trial {one.number} · {one.told} · {len(one.config.skip_set)} of {2 * layers} left out",
            showarrow=False,
            xanchor="left",
            yshift=-2,
            font={"size": 12},
        )
    return drawn


def _hover(one: TrialSummary, kind: str, mask: Sequence[bool]) -> list[str]:
    return [
        f"trial {one.number}: {kind} of layer {layer} {'left out' if skip else 'kept'}"
        for layer, skip in enumerate(mask)
    ]


def _table(best: Sequence[TrialSummary]) -> Table:
    return Table(
        ("trial", "speedup", "95 %", "basis", "predicted", "acceptance", "left out", "draft", "proposed by"),
        [
            (
                str(one.number),
                times(one.figure.value),
                f"{one.figure.low:.2f} to {one.figure.high:.2f}" if one.figure.low < one.figure.high else "",
                one.standing,
                times(one.predicted),
                percent(one.acceptance),
                str(one.config.skip_set),
                one.config.details,
                one.source,
            )
            for one in best
        ],
    )
