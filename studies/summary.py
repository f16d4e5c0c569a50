"""What a study came to, in words; for reports and the dashboard's notes."""

from __future__ import annotations

from collections.abc import Mapping

from studies.speedups import CROSSES_ONE
from studies.view import StudyView, Tried


def verdict(view: StudyView) -> str:
    """The best candidate's speedup, what it rests on, and whether it pays."""
    if not view.ranked:
        return "No candidate was looked at yet."
    best = view.ranked[0]
    basis = {
        "held-out": "measured on prompts that the search never saw",
        "measured": "measured on the search's own prompts, by which it was chosen: expect a little less",
        "predicted": "predicted; nothing was measured yet",
    }
    expected = best.figure.value
    if best.standing == "predicted" and view.measured:
        expected *= view.correction
        basis["predicted"] = "predicted; what was measured was slower"
        if view.correction != 1:
            basis["predicted"] += f", and {view.correction:.2f} times what was predicted of it"
    said = f"Best speedup: {_figure(best)}, {basis[best.standing]}."
    if expected <= 1:
        return f"{said} No candidate beat plain decoding."
    return said if best.standing == "predicted" or best.figure.low > 1 else f"{said} {CROSSES_ONE}"


def facts(view: StudyView) -> list[tuple[str, str]]:
    """What one wants to know of a study beside its figures, as (name, value)."""
    context = view.context
    told = [("model", f"{context['model']}, {view.num_layers} layers (fingerprint {context['fingerprint']})")]
    if view.ranked:
        best = view.ranked[0]
        skipped = f"{best.skip_set} ({len(best.skip_set)} of {2 * view.num_layers} sublayers)"
        told += [
            ("best candidate", f"trial {best.number}"),
            ("left out", skipped),
            ("draft", best.draft or "not recorded"),
        ]
    prompts = f"{context['prompts_per_trial']} a measurement, at most {context['max_new_tokens']} new tokens each"
    return [
        *told,
        ("machine", f"{context['device']}, {context['dtype']}"),
        ("versions", "; ".join(_versions(one) for one in view.versions) or "not recorded"),
        ("prompts", prompts),
        ("trials", _trials(view)),
        ("searched", _when(view)),
    ]


def _figure(best: Tried) -> str:
    has_interval = best.figure.low < best.figure.high
    return str(best.figure) if has_interval else f"{best.figure.value:.2f}×"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _trials(view: StudyView) -> str:
    counts = [f"{len(view.seen)} candidates looked at", f"{len(view.measured)} measured"]
    names = {"fail": "failed or interrupted", "waiting": "queued", "running": "running", "pruned": "pruned"}
    counts += [f"{view.states[state]} {name}" for state, name in names.items() if view.states.get(state)]
    return f"{', '.join(counts)}; {len(view.measurements)} prompts decoded both ways"


def _when(view: StudyView) -> str:
    if view.began is None:
        return "not yet"
    ended = f" to {view.ended:%Y-%m-%d %H:%M}" if view.ended else ""
    return f"{view.began:%Y-%m-%d %H:%M}{ended}"
