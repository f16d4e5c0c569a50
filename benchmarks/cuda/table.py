"""The end of a run: twenty lines, the figures that decide first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cuda.facts import ERROR, read_facts


@dataclass(frozen=True)
class PassLine:
    """A figure that a run must reach.

    Args:
        stage: The stage that measures it.
        name: Of the fact.
        wanted: What is wanted, for people.
        holds: Whether a number is good enough.
    """

    stage: str
    name: str
    wanted: str
    holds: Callable[[float], bool]


PASS_LINES = (
    PassLine("smoke", "failed checks", "0", lambda x: x == 0),
    PassLine("smoke", "memory left behind by a skip set", "< 1 MiB", lambda x: x < 1),
    PassLine("plain", "share of bandwidth", "≥ 0.60", lambda x: x >= 0.6),
    PassLine("plain", "captured tokens/s", "", lambda x: True),
    PassLine("costs", "v(5) after a short text", "≤ 1.10", lambda x: x <= 1.10),
    PassLine("costs", "v(8) after a short text", "≤ 1.15", lambda x: x <= 1.15),
    PassLine("costs", "c(50% kept) after a short text", "≤ 0.57", lambda x: x <= 0.57),
    PassLine("costs", "c(int4) after a short text", "≤ 0.45", lambda x: x <= 0.45),
    PassLine(
        "planted", "planted 0.95: skip γ 4: measured / predicted by counts", "0.95 to 1.05", lambda x: 0.95 <= x <= 1.05
    ),
    PassLine("planted", "planted 0.95: skip γ 4: speedup", "", lambda x: True),
    PassLine("planted", "planted 0.95: int4 and skip γ 4: α", "", lambda x: True),
    PassLine("planted", "planted 0.95: int4 and skip γ 4: speedup", "≥ 1.8", lambda x: x >= 1.8),
    PassLine("planted", "planted 0.95: int4 and skip γ 4: tokens/s", "", lambda x: True),
    PassLine("waits", "fixed length: waits a round", "≤ 1", lambda x: x <= 1.2),
    PassLine("tests", "exit status", "0", lambda x: x == 0),
    PassLine("compiled", "compiled v(1)", "", lambda x: True),
    PassLine("gemma-2", "share of bandwidth", "", lambda x: True),
    PassLine("rivals", "ours tokens/s", "", lambda x: True),
    PassLine("rivals", "transformers static tokens/s", "", lambda x: True),
)


def print_table(path: Path, stages: list[str]) -> None:
    """Print the figures that decide, and the errors, of the stages that ran."""
    facts = list(read_facts(path))
    found = {(fact["stage"], fact["name"]): fact for fact in facts}
    for line in PASS_LINES:
        if line.stage in stages:
            print(_row(line, found.get((line.stage, line.name))))
    for fact in facts:
        if fact["name"] == ERROR:
            print(f"{fact['stage']}: ERROR {fact['value']}")
    print(f"{len(facts)} facts in {path}")


def _row(line: PassLine, fact: dict[str, Any] | None) -> str:
    label = f"{line.stage:8} {line.name:52}"
    if fact is None:
        return f"{label} not measured"
    value = fact["value"]
    if not isinstance(value, int | float):
        return f"{label} {value}"
    verdict = "" if not line.wanted else f"wanted {line.wanted}: {'yes' if line.holds(value) else 'NO'}"
    return f"{label} {value:10.3f} {fact['unit']:5} {verdict}".rstrip()
