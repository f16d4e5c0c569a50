"""Draws docs/images/tokens-per-second.svg from what ``layerskip compare --json`` measured, a file for each model.

python docs/tokens_per_second.py "SmolLM2-135M, float32=smollm2.json" "Qwen2.5-Coder-1.5B, bfloat16=qwen.json"
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "images" / "tokens-per-second.svg"
WIDTH, LABEL, BAR, GAP = 760, 250, 20, 8
STYLE = """<style>
text { fill: #1f2328 }
.paper { fill: #ffffff }
.draft { fill: #0072b2 }
.plain { fill: #999999 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .paper { fill: #1e2129 }
}
</style>"""


def bars(title: str, entries: list[dict[str, Any]], top: int) -> tuple[list[str], int]:
    """The lines of one model's bars, and where the next begin."""
    fastest = max(entry["tokens_per_second"] for entry in entries)
    lines = [f'<text x="0" y="{top + 14}" font-weight="bold">{escape(title)}</text>']
    y = top + 26
    for entry in entries:
        length = (WIDTH - LABEL - 170) * entry["tokens_per_second"] / fastest
        kind = "plain" if entry["acceptance_rate"] is None else "draft"
        figures = f"{entry['tokens_per_second']:.1f} tokens/s · {entry['speedup']:.2f}×"
        lines += [
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(entry["name"])}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" class="{kind}"/>',
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 15}">{figures}</text>',
        ]
        y += BAR + GAP
    return lines, y + 12


def main(arguments: list[str]) -> None:
    """Write the picture."""
    lines: list[str] = []
    top = 0
    for argument in arguments:
        title, _, file = argument.rpartition("=")
        new, top = bars(title, json.loads(Path(file).read_text(encoding="utf-8"))["entries"], top)
        lines += new
    font = 'font-family="system-ui, sans-serif" font-size="14"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" {font}>'
    title = "<title>Tokens per second by method on Spec-Bench, on two models</title>"
    paper = f'<rect class="paper" width="{WIDTH}" height="{top}"/>'
    TARGET.write_text("\n".join([head, title, STYLE, paper, *lines, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
