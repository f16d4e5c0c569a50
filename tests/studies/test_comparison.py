"""A comparison: the advice, the table and the page."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.comparison import (
    COLUMNS,
    TRANSFORMERS_PLAIN,
    Comparison,
    Entry,
    MemoryLimit,
    advice,
    described,
    facts,
    table,
)
from studies.figures.comparison_figures import comparison_figures
from studies.report import render_page
from studies.statistics import Speedup, speedup_of_all

HOSTILE = "</script><img src=x onerror=alert('name')>"


@dataclass(frozen=True)
class Times:
    """One prompt."""

    prompt: str
    draft_seconds: float
    plain_seconds: float = 1.0
    tokens: int = 10
    draft_tokens: int = 10
    drafted: int = 8
    accepted: int = 4


def entry(name, *seconds, **figures):
    """A method that takes so many seconds for three prompts each, where plain decoding takes one."""
    prompts = [Times(f"p{number}", one) for number, one in enumerate(3 * (seconds or (1.0, 1.0)))]
    rate = 10 * len(prompts) / sum(one.draft_seconds for one in prompts)
    values = {
        "tokens_per_second": rate,
        "lowest": 0.9 * rate,
        "highest": 1.1 * rate,
        "speedup": speedup_of_all(prompts),
        "prompts": prompts,
        "acceptance_rate": 0.5,
        "tokens_per_pass": 2.0,
        "draft_cost": 0.25,
        "draft_share": 0.4,
        "draft_bytes": 0,
        "peak_bytes": None,
        "training_seconds": None,
        "near_ties": 0,
        "different": 0,
    }
    return Entry(name=name, **values | figures)


PLAIN = entry("plain decoding", acceptance_rate=None, draft_cost=None, draft_share=0.0, tokens_per_pass=1.0)


def comparison(*entries, **others):
    versions = {"python": "3.11", "torch": "2.13.0"}
    made = Comparison("makers/tiny", "a processor", "float32", "eager", versions, 3, 48, (PLAIN, *entries), {})
    return replace(made, **others)


def test_the_fastest_that_was_shown_to_be_faster_is_advised():
    said = advice(comparison(entry("slow", 0.9, 0.9), entry("fast", 0.5, 0.5), entry("middle", 0.8, 0.8)))
    assert said == "Use fast here: 2.00× the speed of plain decoding (95 %: 2.00 to 2.00)."


@pytest.mark.parametrize(
    "others",
    [
        [],
        [entry("slower", 1.2, 1.3, 1.2)],
        [entry("sometimes", 0.5, 1.4, 0.9)],  # 1.07×, but the interval crosses 1
        [entry("wrong", 0.5, 0.5, 0.5, different=1)],
    ],
)
def test_plain_decoding_is_advised_where_nothing_was_shown_to_be_faster(others):
    assert advice(comparison(*others)) == "Use plain decoding here: nothing was shown to be faster."


def test_few_prompts_show_nothing():
    few = replace(comparison(), entries=(entry("plain decoding", 1.0), entry("fast", 0.1)))
    assert few.prompts == 3
    assert advice(few) == "No clear gain: fewer than 6 prompts are not enough to show that anything is faster."


speedups = st.tuples(*[st.floats(0.1, 5)] * 3).map(sorted).map(lambda of: Speedup(of[1], of[0], of[2]))


@given(st.lists(st.tuples(speedups, st.integers(0, 2))))
def test_advice_is_one_sentence_and_names_no_method_that_is_not_faster_or_has_another_output(drawn):
    entries = [
        replace(entry(f"way {number}"), speedup=speedup, different=different)
        for number, (speedup, different) in enumerate(drawn)
    ]
    made = comparison(*entries)
    said = advice(made)
    assert said.endswith(".")
    assert "\n" not in said
    good = [one for one in entries if one.speedup.low > 1 and not one.different]
    if good:
        assert made.best.speedup.value == max(one.speedup.value for one in good)
        assert said.startswith(f"Use {made.best.name} here")
    else:
        assert made.best is None
        assert said.startswith("Use plain decoding here")


def test_empty_columns_are_left_out():
    columns, rows = table(comparison(entry("fast", 0.5, 0.6, 0.5)))
    assert {"peak", "memory", "training", "÷ transformers", "bandwidth"}.isdisjoint(columns)
    every = entry("all", 0.5, 0.6, 0.5, peak_bytes=2_500_000, draft_bytes=100_000, training_seconds=200.0)
    theirs = entry(TRANSFORMERS_PLAIN, acceptance_rate=None)
    columns, rows = table(comparison(every, theirs, memory=MemoryLimit(1, 100.0)))
    assert columns == ("", *COLUMNS)
    cells = dict(zip(columns, rows[1], strict=True))
    assert (cells["peak"], cells["memory"], cells["training"]) == ("2.4 MiB", "0.1 MiB", "3 min 20 s")
    assert (cells["α"], cells["τ"], cells["c"], cells["drafting"]) == ("50%", "2.00", "0.25", "40%")


def test_speeds_are_compared_with_transformers_plain_decoding_and_with_what_the_memory_allows():
    """Only plain decoding reads all weights for each token: a share of the bandwidth is then one of the limit."""
    theirs = entry(TRANSFORMERS_PLAIN, 1.25, 1.25, acceptance_rate=None, draft_cost=None, tokens_per_pass=1.0)
    made = comparison(entry("fast", 0.5, 0.5), theirs, memory=MemoryLimit(step_bytes=500_000_000, bandwidth=2e10))
    columns, rows = table(made)
    at = columns.index("÷ transformers"), columns.index("bandwidth")
    # Plain decoding: 10 tokens/s, of 40 that the memory allows.
    assert [[row[column] for column in at] for row in rows] == [["1.25×", "25%"], ["2.50×", ""], ["1.00×", "20%"]]
    assert (
        dict(facts(made))["bandwidth"]
        == "the device reads 20.0 GB/s, a plain step 500 MB of weights: at most 40.0 tokens/s"
    )
    values = described(made)
    assert values["memory"] == {"step_bytes": 500_000_000, "bandwidth": 2e10}
    assert [one["over_transformers"] for one in values["entries"]] == [1.25, 2.5, 1.0]
    assert [one["share_of_bandwidth"] for one in values["entries"]] == [0.25, None, 0.2]


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({}, "same"),
        ({"near_ties": 2}, "2 at near-ties"),
        ({"different": 1, "near_ties": 1}, "1 differ, 1 at near-ties"),
    ],
)
def test_the_output_is_said_to_be_the_same_or_how_many_are_not(figures, said):
    assert table(comparison(entry("way", **figures)))[1][1][-1] == said


def test_the_plain_values_have_every_figure():
    said = described(comparison(entry("fast", 0.5, 0.5)))
    assert said["best"] == "fast"
    assert said["prompts"] == 6
    assert said["entries"][1]["prompt_speedups"] == {f"p{number}": 2.0 for number in range(6)}
    assert (said["entries"][1]["speedup_low"], said["entries"][1]["pays"]) == (2.0, True)


def written(made, folder):
    file = folder / "comparison.html"
    file.write_text(
        render_page("Decoding methods", advice(made), facts(made), comparison_figures(made)), encoding="utf-8"
    )
    return file.as_uri()


def test_the_page_shows_all_without_a_network_and_without_a_complaint(tmp_path, visit):
    long = entry("transformers assistant (ready smollm2)", 1.2, 1.1, 1.3)
    made = comparison(
        entry("fast", 0.5, 0.6, 0.5), entry("wrong", 0.4, different=3), long, left_out={"early exit": "no such layer"}
    )
    url = written(made, tmp_path)
    visited = visit(url, offline=True, width=390, height=844)
    assert visited.page.locator(".verdict").inner_text() == advice(made)
    assert visited.page.locator("#figures td", has_text="2.00").first.is_visible()
    assert "early exit did not take part: no such layer." in visited.page.locator("#figures p").inner_text()
    assert visited.page.locator("#speedups g.trace").count() == 2 * 3  # prompts and totals of each kind
    assert visited.page.locator("#times g.trace").count() == 2
    assert visited.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert visited.requests == [url]
    assert visited.complaints == []


def test_names_that_look_like_html_stay_text(tmp_path, visit):
    visited = visit(written(comparison(entry(HOSTILE, 0.5, 0.5)), tmp_path))
    assert HOSTILE in visited.page.locator(".verdict").inner_text()
    assert visited.page.locator("img").count() == 0
    assert visited.complaints == []


def test_a_comparison_of_plain_decoding_alone_has_a_page_too(tmp_path, visit):
    visited = visit(written(comparison(), tmp_path))
    assert "Nothing but plain decoding" in visited.page.locator("#speedups").inner_text()
    assert visited.complaints == []
