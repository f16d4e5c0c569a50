"""Notices of libraries that say nothing to a user of this program. Imports no library."""

from __future__ import annotations

import logging

# Imported by transformers; both warn at import.
_CHATTY = ("torchao", "torch.utils._pytree")


def silence_notices() -> None:
    """Let libraries that warn when they are imported speak of errors alone; to be called before they are."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
