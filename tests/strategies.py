"""What hypothesis draws: skip sets, draft exits, prompts."""

from hypothesis import strategies as st

from layerskip import AdaptiveThreshold, ConfidenceThreshold, FixedLength, SkipSet
from layerskip.names import PRECISIONS
from layerskip.token_tree import TokenTree, branches_of
from tests.models import LAYERS, VOCABULARY

fractions = st.floats(0, 1)
lengths = st.integers(1, 9)


def masks(layers=LAYERS):
    """One flag per sublayer, at least one of them false."""
    return st.lists(st.booleans(), min_size=2 * layers, max_size=2 * layers).filter(lambda mask: not all(mask))


def skip_sets(layers=LAYERS):
    """Any skip set; half of them skip one or two sublayers only, so that their drafts are often right."""
    few = st.sets(st.integers(0, 2 * layers - 1), min_size=1, max_size=min(2, 2 * layers - 1))
    light = few.map(lambda skipped: [i in skipped for i in range(2 * layers)])
    return (light | masks(layers)).map(SkipSet.from_mask)


def precisions():
    return st.sampled_from(PRECISIONS)


def low_precisions():
    return st.sampled_from(PRECISIONS[1:])


def draft_exits():
    return st.one_of(
        st.builds(FixedLength, lengths),
        st.builds(ConfidenceThreshold, threshold=fractions, max_length=lengths),
        st.builds(
            AdaptiveThreshold,
            initial_threshold=fractions,
            max_length=lengths,
            target_rate=fractions,
            step=fractions,
            rate_momentum=fractions,
            threshold_momentum=fractions,
        ),
    )


def tokens(max_size, min_size=1):
    return st.lists(st.integers(0, VOCABULARY - 1), min_size=min_size, max_size=max_size)


def trees(max_tokens=8):
    """Any tree: each token follows some row before it."""
    sizes = st.integers(0, max_tokens)
    return sizes.flatmap(lambda size: st.tuples(*(st.integers(0, row) for row in range(size)))).map(TokenTree)


def branches():
    """How many tokens a draft proposes for its first places."""
    return st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def bushes(draw):
    """Branches that go on behind several tokens of a place."""
    widths, before = [], 1
    for _ in range(draw(st.integers(0, 4))):
        others = st.lists(st.integers(0, 3), max_size=min(before - 1, 4))
        widths.append((draw(st.integers(1, 4)), *draw(others)))
        before = sum(widths[-1])
    return branches_of(widths)
