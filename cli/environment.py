"""What is installed, looked up without importing any of it: this has to work where an import would fail."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import InvalidRequirement, Requirement

# The extras of people who use layerskip, and what each is for; the others are for who develops it.
EXTRAS = {
    "gguf": "GGUF files, among them the default model's",
    "dashboard": "the Optuna dashboard",
    "postgres": "studies in PostgreSQL",
    "grpc": "studies behind a server",
}


@dataclass(frozen=True)
class Package:
    """One package that layerskip needs, or that an extra brings.

    Args:
        name: Its name.
        needed: The versions that layerskip works with, such as ``>=2.11``.
        installed: The version that is installed; None if none is.
        fits: Whether that one is among them.
        extra: The extra that brings it; None if layerskip cannot do without it.
    """

    name: str
    needed: str
    installed: str | None
    fits: bool
    extra: str | None


def packages() -> list[Package]:
    """The packages that layerskip needs, and those of its extras."""
    try:
        lines = requires("layerskip") or []
    except PackageNotFoundError:  # a checkout on the path, not installed
        lines = []
    found = (_package(line, extra) for line in lines for extra in (None, *EXTRAS))
    return [package for package in found if package is not None]


def python_version() -> Package:
    """Python itself."""
    installed = platform.python_version()
    needed = Requirement("python>=3.11")
    return Package("python", str(needed.specifier), installed, needed.specifier.contains(installed, True), None)


def _package(line: str, extra: str | None) -> Package | None:
    """A requirement, if it is one of layerskip itself (extra None) or one that the extra adds."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return None
    marker = requirement.marker
    wanted = marker is None if extra is None else marker is not None and _brings(requirement, extra)
    if not wanted:
        return None
    try:
        installed: str | None = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return Package(requirement.name, str(requirement.specifier), installed, fits, extra)


def _brings(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
