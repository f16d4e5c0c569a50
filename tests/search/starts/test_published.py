"""Skip sets that others have published."""

import json
from importlib.resources import files

from search.starting_skip_sets import published


def test_a_model_gets_what_was_published_for_its_depth():
    sources = [source for source, _ in published(42)]
    assert len(sources) == 1
    assert sources[0].startswith("published for gemma-2-9b-it: ")


def test_the_task_that_a_skip_set_was_found_on_is_named():
    assert any(
        source.startswith("published for llama-2-13b on cnndm: SWIFT") and "2410.06916" in source
        for source, _ in published(40)
    )


def test_a_depth_that_nobody_published_for_gets_nothing():
    assert list(published(7)) == []


def test_every_published_skip_set_is_a_start_of_its_depth():
    entries = json.loads((files("search") / "data" / "published_skip_sets.json").read_text(encoding="utf-8"))
    depths = {entry["num_hidden_layers"] for entry in entries}
    assert sum(len(list(published(depth))) for depth in depths) == len(entries) > 0
