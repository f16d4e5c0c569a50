"""Files that lie elsewhere in the repository and are pages of the site too.

Pages link to them by their place in the repository, so that links work wherever the repository is read; here these
links are turned to the pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, except those that the documentation has a page of its own for."""
    repository = Path(config.config_file_path).parent
    for place, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=str(repository / place)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to places in the repository to the site's pages."""
    page_of = {place: name for name, place in _places().items()}
    here = posixpath.dirname(page_of.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    folder = posixpath.dirname(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(here, link[1]))
        target = PAGES.get(place) or place.removeprefix("docs/")
        return posixpath.relpath(target, folder or ".")

    return _LINK.sub(turned, markdown)


def _places() -> dict[str, str]:
    """The repository's files that have no page of their own, with their pages."""
    return {place: page for place, page in PAGES.items() if page != "index.md"}
