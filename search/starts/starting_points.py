"""Starts as candidates of a search space."""

from __future__ import annotations

from collections.abc import Iterator

from layerskip.decoding.draft_exit import ConfidenceThreshold
from search.space import Candidate, SearchSpace
from search.starts.evenly_spaced import evenly_spaced


def starting_points(space: SearchSpace) -> Iterator[tuple[str, Candidate]]:
    """Candidates that need nothing but the depth of the stack, each with its name.

    Args:
        space: The choices of the search.
    """
    draft_exit = ConfidenceThreshold(max_length=min(ConfidenceThreshold.max_length, space.max_draft_length))
    vocabulary = space.vocabularies[len(space.vocabularies) // 2]
    for source, skip_set in evenly_spaced(space.num_layers):
        yield source, Candidate(skip_set, draft_exit, bridged=space.bridges, vocabulary=vocabulary)
