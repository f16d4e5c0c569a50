"""Skip sets that others have found and published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files

from layerskip.stack.skipset import SkipSet
from search.starts.start import Start


def published(num_layers: int) -> Iterator[Start]:
    """Published skip sets of models with as many layers, whatever the model: depth is what they have in common.

    Args:
        num_layers: Decoder layers of the model.
    """
    text = (files("search") / "data" / "published_skip_sets.json").read_text(encoding="utf-8")
    for entry in json.loads(text):
        if entry["num_hidden_layers"] == num_layers:
            task = f" on {entry['task']}" if "task" in entry else ""
            skip_set = SkipSet(num_layers, tuple(entry["attention"]), tuple(entry["mlp"]))
            yield f"published for {entry['model']}{task}: {entry['source']}", skip_set
