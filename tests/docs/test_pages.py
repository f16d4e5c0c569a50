"""The documentation: links lead somewhere, the reference is whole, and the figures that are computed are right."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import layerskip
from search.settings import SAMPLERS

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
IMAGES = sorted(DOCS.glob("images/*.svg"))

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")
_LONGEST_DRAFT = 8


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def anchors_of(page):
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links_of(page):
    return _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_of_the_repository_and_a_heading_in_it(page):
    broken = []
    for link in links_of(page):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        found = target.is_file() and target.is_relative_to(REPOSITORY)
        if not found or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


def test_links_are_found_at_all():
    assert "docs/images/stack.svg" in links_of(REPOSITORY / "README.md")


def test_the_readme_fits_two_screens():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_every_page_is_in_the_navigation_and_every_entry_of_it_is_a_page():
    settings = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), yaml.SafeLoader)
    groups = [entries for group in settings["nav"] for entries in group.values()]
    listed = {page for entries in groups for entry in entries for page in entry.values()}
    elsewhere = {"benchmarks.md", "contributing.md", "changelog.md"}
    assert listed - elsewhere == {page.name for page in DOCS.glob("*.md")}


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"^::: layerskip\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(layerskip.__all__)


@pytest.mark.parametrize("image", IMAGES, ids=name_of)
def test_a_picture_stands_by_itself_has_a_title_and_knows_dark_pages(image):
    text = image.read_text(encoding="utf-8")
    picture = ET.fromstring(text)
    assert picture.find("{http://www.w3.org/2000/svg}title") is not None
    assert "prefers-color-scheme: dark" in text
    assert set(re.findall(r"https?://[^\"']+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_samplers_that_are_described_are_those_of_the_command():
    table = (DOCS / "searching.md").read_text(encoding="utf-8").partition("## Samplers\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(SAMPLERS)


# The tables of how-fast.md, computed anew.


def table_under(heading, number):
    text = (DOCS / "how-fast.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number].splitlines()]
    return [cell.split()[-1] for cell in header], rows


def best_speedup(acceptance, cost, verification):
    """The formula of the page, with the best draft length."""
    return max(
        sum(acceptance**n for n in range(length + 1)) / (length * cost + verification)
        for length in range(1, _LONGEST_DRAFT + 1)
    )


def test_the_speedups_are_those_of_the_formula():
    header, rows = table_under("Break-even", 1)
    assert len(rows) == 12
    for cost, verification, *speedups in rows:
        for acceptance, speedup in zip(header[2:], speedups, strict=True):
            computed = best_speedup(float(acceptance), float(cost), float(verification))
            assert float(speedup) == pytest.approx(computed, abs=0.0051)  # rounded


def test_at_the_break_even_points_a_draft_begins_to_pay():
    header, rows = table_under("Break-even", 0)
    assert len(rows) == 9
    for cost, *points in rows:
        for verification, point in zip(header[1:], points, strict=True):
            below, above = (best_speedup(float(point) + d, float(cost), float(verification)) for d in (-0.0051, 0.0051))
            assert below < 1 < above
        assert all(float(a) <= float(b) for a, b in pairwise(points))
