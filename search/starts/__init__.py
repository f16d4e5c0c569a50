"""Where a search starts: skip sets that are tried before the sampler has anything to go by.

A random skip set leaves out half of all sublayers, and a draft like that is almost never right. Each family of starts
here knows a little more: the depth of the stack, the hidden states, what leaving out one sublayer costs, or what
others have published.
"""

from search.starts.early_exits import early_exits
from search.starts.evenly_spaced import evenly_spaced
from search.starts.least_change import least_change
from search.starts.nothing_skipped import nothing_skipped
from search.starts.paths import most_similar_paths
from search.starts.published import published
from search.starts.ranking import least_damage, skipping_below
from search.starts.start import Start, different

__all__ = [
    "Start",
    "different",
    "early_exits",
    "evenly_spaced",
    "least_change",
    "least_damage",
    "most_similar_paths",
    "nothing_skipped",
    "published",
    "skipping_below",
]
