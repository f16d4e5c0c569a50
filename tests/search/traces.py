"""Traces with known contents."""

import numpy as np

from search.traces import LAST_RANK, Trace


def stack_trace(ranks, confidence=None, target=None, prompt_length=3, *, longest=9):
    """The trace of a draft of the stack, all of whose places are alike, from values by position."""
    rows = (np.array(ranks, int), np.ones(len(ranks)) if confidence is None else np.array(confidence))
    by_place = (np.broadcast_to(row, (longest, len(row))) for row in rows)
    target = np.ones(len(ranks)) if target is None else np.array(target)
    return Trace(*by_place, target, prompt_length, len(ranks) + 1)


def head_trace(*ranks, confidence=0.5, target=0.5):
    """The trace of draft heads, from the ranks of each place by the token from which a draft starts."""
    positions = len(ranks[0])
    by_place = np.full((len(ranks), positions), LAST_RANK)
    for place, row in enumerate(ranks):
        by_place[place, place : place + len(row)] = row
    return Trace(by_place, np.full(by_place.shape, confidence), np.full(positions, target), 3, positions + 1)
