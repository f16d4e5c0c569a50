"""What a run has found out so far: a line of JSON for every number, written at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a stage writes when it begins and when it ends, for whoever watches it.
BEGIN, END, ERROR = "begin", "end", "error"


@dataclass(frozen=True)
class Facts:
    """The file of a run, and the stage that writes to it.

    Args:
        path: The file; it grows by a line for each fact.
        stage: Name of the stage.
    """

    path: Path
    stage: str

    def add(self, name: str, value: Any, unit: str = "") -> None:
        """Write a fact down, so that it is there whatever happens next."""
        fact = {"stage": self.stage, "name": name, "value": value, "unit": unit, "t": round(time.time(), 3)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fact) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add_seconds(self, name: str, seconds: float) -> None:
        """Write a duration down, in milliseconds."""
        self.add(name, 1000 * seconds, "ms")


def read_facts(path: Path) -> Iterator[dict[str, Any]]:
    """All facts of a file; without a last line that was cut off."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
