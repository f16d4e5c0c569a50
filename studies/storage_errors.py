"""Errors of a study's database, as one-line messages."""

from __future__ import annotations

import re
from collections.abc import Iterator

import sqlalchemy
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from layerskip.errors import LayerSkipError, first_line

NO_URL = "not a database URL; expected one such as sqlite:///layerskip.db"
# What a file's name may look like, and no URL with a password.
_PATH = re.compile(r"[\w./~-]+\.(db|sqlite3?)")
MALFORMED = (ArgumentError, ValueError)  # a ValueError: the port is not a number
# Options of drivers that hold no secret. Any other may: odbc_connect contains a password, and drivers have tokens.
_HARMLESS_OPTIONS = (
    "application_name",
    "cache",
    "charset",
    "check_same_thread",
    "client_encoding",
    "connect_timeout",
    "driver",
    "host",
    "immutable",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "mode",
    "options",
    "port",
    "sslmode",
    "target_session_attrs",
    "tcp_user_timeout",
    "timeout",
    "unix_socket",
    "uri",
    "user",
)


class StorageError(LayerSkipError):
    """A study's database cannot be opened, read or written."""


def redacted(url: str | URL) -> str:
    """A storage URL with its password, and options that may be secret, replaced by stars."""
    try:
        parsed = make_url(url)
    except MALFORMED:
        return url if isinstance(url, str) and _PATH.fullmatch(url) else "(malformed)"
    stars = {name: "***" for name in parsed.query if name.lower() not in _HARMLESS_OPTIONS}
    return parsed.update_query_dict(stars).render_as_string(hide_password=True).replace("%2A", "*")


def storage_error(url: str | URL, error: Exception) -> StorageError:
    """An error of the database as one line that names the storage."""
    return StorageError(f"storage '{redacted(url)}': {_reason(error)}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause or context, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    for cause in causes(error):
        if isinstance(cause, NoSuchModuleError):
            return "unknown kind of database"
        if isinstance(cause, ArgumentError):
            return NO_URL
        if isinstance(cause, sqlalchemy.exc.DBAPIError):
            return first_line(cause.orig or cause)
    return first_line(error)
