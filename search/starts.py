"""Where a search starts: skip sets that are tried before the sampler has anything to go by.

A random skip set leaves out half of all sublayers, and a draft like that is almost never right. Skipping little, in
the middle of the stack, is where every published skip set begins.
"""

from __future__ import annotations

from collections.abc import Iterator

from layerskip.decoding.draft_exit import ConfidenceThreshold
from layerskip.stack.skipset import SkipSet
from search.space import Candidate, SearchSpace

# (what to leave out, share of the inner layers)
_STARTS = (
    ("attention", 1 / 4),
    ("attention", 1 / 2),
    ("mlp", 1 / 8),
    ("both", 1 / 8),
    ("both", 1 / 4),
)


def starting_points(space: SearchSpace) -> Iterator[tuple[str, Candidate]]:
    """Evenly spaced skip sets (SWIFT, arXiv 2410.06916, starts from such ones) of growing size, each with its name.

    The first and the last layer are kept: without them drafts fail.
    """
    inner = range(1, space.num_layers - 1)
    draft_exit = ConfidenceThreshold(max_length=min(ConfidenceThreshold.max_length, space.max_draft_length))
    seen = {SkipSet(space.num_layers)}
    for kind, share in _STARTS:
        count = round(share * len(inner))
        layers = tuple(inner[int((i + 0.5) * len(inner) / count)] for i in range(count))
        skip_set = SkipSet(
            space.num_layers,
            attention=layers if kind in ("attention", "both") else (),
            mlp=layers if kind in ("mlp", "both") else (),
        )
        if skip_set in seen:  # in a shallow model, shares round to the same count, or to none
            continue
        seen.add(skip_set)
        yield (
            f"evenly spaced: {kind}, {share:.1%} of the inner layers",
            Candidate(
                skip_set, draft_exit, bridged=space.bridges, vocabulary=space.vocabularies[len(space.vocabularies) // 2]
            ),
        )
