"""Where a worker's process begins: what it works with is imported after libraries were asked to be quiet."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection

from layerskip.notices import silence_notices


def run(work: bytes, messages: Connection) -> None:
    """Run a worker.

    Args:
        work: A function and what it works on, pickled; unpickling them imports torch and transformers.
        messages: Where it says why it gave up.
    """
    silence_notices()
    function, argument = pickle.loads(work)
    function(argument, messages)
