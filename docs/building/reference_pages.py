"""How docstrings and signatures come onto the pages of the reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turns ``:func:`name``` in a docstring to a link, where there is something to link to."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn the roles of one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


class PublicFields(griffe.Extension):
    """Keeps class variables, such as what pydantic reads, out of the signatures of dataclasses."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Tidy the signature of one class."""
        made = cls.members.get("__init__")
        if isinstance(made, griffe.Function):
            made.parameters = griffe.Parameters(*(one for one in made.parameters if not one.name.startswith("__")))


def _link(obj: griffe.Object, name: str) -> str:
    first, dot, rest = name.partition(".")
    try:
        target = obj.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        target = name
    return f"<autoref optional identifier='{target}'><code>{name}</code></autoref>"
