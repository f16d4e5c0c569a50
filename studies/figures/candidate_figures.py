"""Figures of the candidates that a study evaluated: what they skip, how fast they are, and in which order they came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go

from layerskip.names import Precision
from studies.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HELD_OUT,
    MEASURED,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    VERMILION,
    DataTable,
    Picture,
    SpeedupRow,
    add_break_even,
    empty_figure,
    format_percent,
    format_speedup,
    speedup_rows,
)
from studies.records import MeasurementRecord
from studies.statistics import Speedup, speedup_of_all, speedup_of_prompt
from studies.view import StudyView, TrialSummary

# Skip map: its cells by their values, from the ones that run as they are, through lower precision, to the skipped ones.
_CELLS = (
    ("kept", PALE),
    ("kept at int8", "#bcdcd1"),
    ("kept at int4", "#7dbba5"),
    ("attention skipped", BLUE),
    ("MLP skipped", ORANGE),
)
_KEPT: Mapping[Precision, int] = {"full": 0, "int8": 1, "int4": 2}
_ATTENTION, _MLP = 3, 4
_LINES = 3  # of each candidate: its name, attention, MLP
_LINE_PIXELS = 19
# With more layers, gaps between them would eat up the cells on a phone.
_MOST_LAYERS_WITH_GAPS = 48


def skip_map(view: StudyView, count: int) -> Picture:
    """The sublayers that the best candidates skip: a row of layers for attention and a row for the MLPs of each.

    Args:
        view: The study.
        count: Most candidates to show.
    """
    title = "Sublayers skipped by the best candidates"
    best = view.ranked[:count]
    if not best:
        return Picture("skip-map", title, "No candidate was evaluated yet.", None)
    return Picture("skip-map", title, _skip_map_caption(best), _draw_skip_map(best), _skip_map_table(best))


def _skip_map_caption(best: Sequence[TrialSummary]) -> str:
    caption = "Blue and orange cells are skipped while drafting; green ones run at lower precision. "
    if len(best) == 1:
        return f"{caption}There is one candidate so far."
    return (
        f"{caption}Best first: speedups on held-out prompts, then the other measured ones, then the predicted ones, "
        "last others that were given up after some texts or prompts."
    )


def _draw_skip_map(best: Sequence[TrialSummary]) -> go.Figure:
    layers = best[0].config.skip_set.num_layers
    cells: list[Sequence[int | None]] = []
    hover: list[list[str]] = []
    for trial in best:
        attention, mlp = trial.config.skip_set.skips_attention, trial.config.skip_set.skips_mlp
        kept = _KEPT[trial.config.precision]
        cells += [[None] * layers, [_ATTENTION if skip else kept for skip in attention]]
        cells += [[_MLP if skip else kept for skip in mlp]]
        hover += [[""] * layers, _hover(trial, "attention", attention), _hover(trial, "MLP", mlp)]
    drawn = empty_figure(
        height=_LINES * _LINE_PIXELS * len(best) + 110,
        xaxis={"title": {"text": "layer"}, "showgrid": False, "range": [-0.5, layers - 0.5], "showline": False},
        yaxis={
            "autorange": "reversed",
            "showgrid": False,
            "showline": False,
            "ticks": "",
            "tickvals": [_LINES * i + line for i in range(len(best)) for line in (1, 2)],
            "ticktext": ["attn", "MLP"] * len(best),
            "tickfont": {"size": 10},
        },
    )
    drawn.add_trace(
        go.Heatmap(
            x=list(range(layers)),
            y=list(range(_LINES * len(best))),
            z=cells,
            zmin=-0.5,
            zmax=len(_CELLS) - 0.5,
            xgap=1 if layers <= _MOST_LAYERS_WITH_GAPS else 0,
            ygap=1,
            showscale=False,
            colorscale=[
                [edge / len(_CELLS), colour] for cell, (_, colour) in enumerate(_CELLS) for edge in (cell, cell + 1)
            ],
            text=hover,
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
        )
    )
    shown = {value for row in cells for value in row}
    for value, (name, colour) in enumerate(_CELLS):
        if value not in shown:
            continue
        marker = {"symbol": "square", "color": colour, "size": 12}
        drawn.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=marker))
    for i, trial in enumerate(best):
        drawn.add_annotation(
            x=-0.5,
            y=_LINES * i,
            text=_skip_map_label(trial),
            showarrow=False,
            xanchor="left",
            yshift=-2,
            font={"size": 12},
        )
    return drawn


def _hover(trial: TrialSummary, kind: str, mask: Sequence[bool]) -> list[str]:
    kept = _CELLS[_KEPT[trial.config.precision]][0]
    return [
        f"trial {trial.number}: {kind} of layer {layer} {'skipped' if skip else kept}"
        for layer, skip in enumerate(mask)
    ]


def _skip_map_label(trial: TrialSummary) -> str:
    skip_set = trial.config.skip_set
    skipped = f"{len(skip_set)} of {2 * skip_set.num_layers} skipped"
    kept = [] if trial.config.precision == "full" else [f"the others at {trial.config.precision}"]
    return " · ".join([f"trial {trial.number}", trial.label, skipped, *kept])


def _skip_map_table(best: Sequence[TrialSummary]) -> DataTable:
    return DataTable(
        ("trial", "speedup", "95 %", "basis", "predicted", "one-step acceptance", "skipped", "draft", "proposed by"),
        [
            (
                str(trial.number),
                format_speedup(trial.best_speedup.value),
                _interval(trial.best_speedup),
                trial.best_basis,
                format_speedup(trial.predicted),
                format_percent(trial.acceptance),
                str(trial.config.skip_set),
                trial.config.details,
                trial.source,
            )
            for trial in best
        ],
    )


def _interval(speedup: Speedup) -> str:
    return f"{speedup.low:.2f} to {speedup.high:.2f}" if speedup.low < speedup.high else ""


# Speedup of each prompt.
_PROMPT_SET_MARKERS: Mapping[str, dict[str, Any]] = {"held-out": HELD_OUT, "search": MEASURED}
PromptGroup = tuple[int, str, Sequence[MeasurementRecord]]  # a trial's number, the prompt set, its measurements


def prompts(view: StudyView, count: int) -> Picture:
    """The measured prompts of each candidate, with the speedup of all of them together.

    Args:
        view: The study.
        count: Most rows.
    """
    title = "Speedup of each prompt"
    groups = _prompt_groups(view)
    if not groups:
        return Picture("prompts", title, "No prompt was measured yet.", None)
    caption = (
        "Small marks are single prompts, each decoded with and without the draft in turn; the large mark is their "
        "total, with its 95 % interval from resampling prompts. Green squares are held-out prompts."
    )
    if len(groups) > count:
        caption += f" The best {count} of {len(groups)} are drawn; the table has all."
    rows = [
        SpeedupRow(
            name=f"trial {trial}",
            label=f"trial {trial}<br>{prompt_set}",
            kind=f"{prompt_set} prompts",
            marker=_PROMPT_SET_MARKERS[prompt_set],
            prompts=records,
        )
        for trial, prompt_set, records in groups[:count]
    ]
    return Picture("prompts", title, caption, speedup_rows(rows), _prompts_table(groups))


def _prompt_groups(view: StudyView) -> list[PromptGroup]:
    """Held-out measurements first, best first within each prompt set."""
    groups: dict[tuple[int, str], list[MeasurementRecord]] = {}
    for record in view.measurements:
        groups.setdefault((record.trial, record.prompt_set), []).append(record)
    return sorted(
        ((*key, records) for key, records in groups.items()),
        key=lambda group: (group[1] != "held-out", -speedup_of_all(group[2]).value),
    )


def _prompts_table(groups: Sequence[PromptGroup]) -> DataTable:
    rows: list[Sequence[str]] = []
    for trial, prompt_set, records in groups:
        total = speedup_of_all(records)
        rows.append((str(trial), prompt_set, f"all {len(records)}", format_speedup(total.value), _interval(total)))
        rows += [
            (str(trial), prompt_set, record.prompt, format_speedup(speedup_of_prompt(record)), "") for record in records
        ]
    return DataTable(("trial", "prompts", "prompt", "speedup", "95 %"), rows)


# A trial, the speedup that was predicted for the prompts that it was measured on, and that it had there.
Measured = tuple[TrialSummary, float, Speedup]


def predictions(view: StudyView) -> Picture:
    """The predicted speedups of candidates and the measured ones, on the search's and on held-out prompts."""
    title = "Predicted and measured speedup"
    searched = [(t, t.predicted_here, t.speedup) for t in view.measured if not t.stopped]
    held_out = [(t, t.predicted, t.held_out) for t in view.ranked if t.held_out is not None]
    if not searched and not held_out:
        caption = "No candidate was measured yet: all speedups of this study are predicted."
        return Picture("predictions", title, caption, None)
    caption = (
        "Speedups with their 95 % intervals, which come from resampling prompts. On the line, predictions are right."
    )
    ratio = view.measured_over_predicted
    if ratio is not None:
        caption += f" Dashed: measured ÷ predicted for the prompts that were measured, median {ratio:.2f}."
    drawn = _draw_predictions(searched, held_out, ratio)
    return Picture("predictions", title, caption, drawn, _predictions_table(searched, held_out))


def _draw_predictions(searched: Sequence[Measured], held_out: Sequence[Measured], ratio: float | None) -> go.Figure:
    predicted = [at for _, at, _ in (*searched, *held_out)]
    ends = [end for _, _, speedup in (*searched, *held_out) for end in (speedup.low, speedup.high)]
    low, high = 0.95 * min(*predicted, *ends), 1.05 * max(*predicted, *ends)
    drawn = empty_figure(
        height=460,
        xaxis={"title": {"text": "predicted speedup"}, "range": [low, high], "ticksuffix": "×"},
        yaxis={"title": {"text": "measured speedup"}, "range": [low, high], "ticksuffix": "×"},
    )
    lines = [("as predicted", 1.0, {"color": GREY, "width": 1})]
    if ratio is not None:
        lines.append((f"median {ratio:.2f}", ratio, {"color": VERMILION, "width": 1, "dash": "dash"}))
    for name, slope, line in lines:
        x, y = [low, high], [slope * low, slope * high]
        drawn.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line, name=name, hoverinfo="skip"))
    for name, measured, marker in (
        ("search's prompts", searched, MEASURED),
        ("held-out prompts", held_out, HELD_OUT),
    ):
        if measured:
            _add_measured(drawn, measured, name, marker)
    return drawn


def _add_measured(drawn: go.Figure, measured: Sequence[Measured], name: str, marker: dict[str, Any]) -> None:
    drawn.add_trace(
        go.Scatter(
            x=[at for _, at, _ in measured],
            y=[speedup.value for _, _, speedup in measured],
            error_y={
                "array": [speedup.high - speedup.value for _, _, speedup in measured],
                "arrayminus": [speedup.value - speedup.low for _, _, speedup in measured],
                "thickness": 1.5,
                "width": 4,
            },
            mode="markers",
            marker=marker,
            name=name,
            text=[
                f"trial {trial.number}: predicted {format_speedup(at)}, measured {speedup}"
                for trial, at, speedup in measured
            ],
            hovertemplate="%{text}<extra></extra>",
        )
    )


def _predictions_table(searched: Sequence[Measured], held_out: Sequence[Measured]) -> DataTable:
    rows = [
        (
            str(trial.number),
            prompt_set,
            format_speedup(at),
            format_speedup(speedup.value),
            f"{speedup.low:.2f} to {speedup.high:.2f}",
        )
        for prompt_set, measured in (("search", searched), ("held-out", held_out))
        for trial, at, speedup in measured
    ]
    return DataTable(("trial", "prompts", "predicted", "measured", "95 %"), rows)


# History. Sources are told apart by shape, and by colour as far as there are colours; neither diamonds nor squares,
# which are measured wherever they are.
_SYMBOLS = ("circle-open", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hourglass", "bowtie")
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK, VERMILION, GREY)
_REPEATED = "interrupted trial"


def history(view: StudyView) -> Picture:
    """Every trial's speedup in order, by source, with the best so far."""
    if not view.trials:
        return Picture("history", "History", "No trial is finished yet.", None)
    caption = (
        "Trials in order, by the source that proposed them: warm starts first, then the sampler. Diamonds are "
        "measured, hollow diamonds stopped early, after some prompts; all other marks are predictions. The lines are "
        "the best predicted and the best measured so far."
    )
    if view.measured_over_predicted is not None:
        ratio = f"{view.measured_over_predicted:.2f}"
        caption += f" Measured speedups were {ratio} times those predicted for the same prompts (median)."
    return Picture("history", "History", caption, _draw_history(view), _history_table(view.trials))


def family_of(source: str) -> str:
    """The family of a source: the text before its colon, without numbers of trials."""
    family = source.partition(":")[0]
    return _REPEATED if family.startswith(_REPEATED) else family


def _draw_history(view: StudyView) -> go.Figure:
    last = view.trials[-1].number
    drawn = empty_figure(
        height=560,
        xaxis={"title": {"text": "trial"}, "range": [-0.02 * last - 0.5, 1.02 * last + 0.5]},
        yaxis={"title": {"text": "speedup"}, "ticksuffix": "×"},
        legend={"y": -0.16, "yanchor": "top"},
    )
    add_break_even(drawn, "y")
    predicted = [trial.as_predicted for trial in view.trials if not trial.revisits]
    families: dict[str, list[TrialSummary]] = {}
    for trial in predicted:
        families.setdefault(family_of(trial.source), []).append(trial)
    most_first = sorted(families.items(), key=lambda family: -len(family[1]))
    for number, (family, trials) in enumerate(most_first):
        symbol, colour = _SYMBOLS[number % len(_SYMBOLS)], _COLOURS[number % len(_COLOURS)]
        _add_trials(drawn, trials, escape(family), {"symbol": symbol, "color": colour, "size": 7})
    _add_best_so_far(drawn, predicted, "best predicted so far", (BLUE, "solid"), last)
    # The speedup of a measurement that was stopped early is that of a few prompts, which may be easy ones.
    whole = [trial for trial in view.measured if not trial.stopped]
    _add_best_so_far(drawn, whole, "best measured so far", (VERMILION, "dash"), last)
    _add_trials(drawn, whole, "measured", MEASURED)
    stopped = [trial for trial in view.measured if trial.stopped]
    _add_trials(drawn, stopped, "measured, stopped early", MEASURED | {"symbol": "diamond-open"})
    return drawn


def _add_trials(drawn: go.Figure, trials: Sequence[TrialSummary], name: str, marker: dict[str, object]) -> None:
    if not trials:
        return
    drawn.add_trace(
        go.Scatter(
            x=[trial.number for trial in trials],
            y=[trial.speedup.value for trial in trials],
            mode="markers",
            marker=marker,
            name=name,
            text=[
                f"trial {trial.number}: {format_speedup(trial.speedup.value)} {trial.basis}<br>"
                f"{escape(trial.source)}<br>{trial.config.skip_set}"
                for trial in trials
            ],
            hovertemplate="%{text}<extra></extra>",
        )
    )


def _add_best_so_far(
    drawn: go.Figure, trials: Sequence[TrialSummary], name: str, line: tuple[str, str], last: int
) -> None:
    if not trials:
        return
    colour, dash = line
    best = list(accumulate((trial.speedup.value for trial in trials), max))
    drawn.add_trace(
        go.Scatter(
            x=[*(trial.number for trial in trials), last],
            y=[*best, best[-1]],
            mode="lines",
            line={"color": colour, "shape": "hv", "width": 1.5, "dash": dash},
            name=name,
            hoverinfo="skip",
        )
    )


def _history_table(trials: Sequence[TrialSummary]) -> DataTable:
    return DataTable(
        ("trial", "speedup", "basis", "proposed by", "skipped", "draft"),
        [
            (
                str(trial.number),
                format_speedup(trial.speedup.value),
                trial.basis,
                trial.source,
                str(trial.config.skip_set),
                trial.config.details,
            )
            for trial in trials
        ],
    )
