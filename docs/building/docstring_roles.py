"""Docstrings name other things as ``:func:`name```; here such a name becomes a link, where there is something to link to."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`~?([\w.]+)`")


class DocstringRoles(griffe.Extension):  # type: ignore[misc]
    """Turns roles into links before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn the roles of one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: griffe.Object, name: str) -> str:
    try:
        target = obj.resolve(name.partition(".")[0]) + name[len(name.partition(".")[0]) :]
    except griffe.NameResolutionError:
        target = name
    return f"<autoref optional identifier='{target}'><code>{name}</code></autoref>"
