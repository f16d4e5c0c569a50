"""What copying brings, foretold: as in real decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import FixedLength, SkipDrafter, SkipSet, generate
from layerskip.decoding.ngrams import NGramDrafter, NGrams, behind_copies
from search.copying import Copies, copies_along, copying_policies
from search.reference import continuations, record
from search.space import Policy
from tests.models import LAYERS

ngrams = st.builds(lambda least, more, length: NGrams(least, least + more, length), *[st.integers(1, 3)] * 3)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), ngrams, st.integers(2, 14))
@settings(max_examples=40)
def test_copies_along_a_text_are_those_of_decoding(tiny, prompt, one, length):
    """Played round by round, they draft and accept what a drafter of copies does."""
    [new] = continuations(tiny, [prompt], length)
    copies = Copies.of(record(tiny, prompt, new), one)
    place = drafted = accepted = 0
    while place < len(new) - 1:
        proposed = min(copies.drafted[place], length - place - 2)
        stood = min(proposed, copies.stand[place])
        drafted, accepted, place = drafted + proposed, accepted + stood, place + stood + 1
    stats = generate(tiny, prompt, drafter=NGramDrafter(one), max_new_tokens=length).stats
    assert (stats.drafted, stats.accepted) == (drafted, accepted)


def test_every_policy_but_the_first_copies(llama):
    policy = Policy(FixedLength(2))
    [first, *others] = copying_policies(policy)
    assert first == policy
    assert {other.ngrams for other in others} == set(copies_along([record(llama, [1, 2], [3, 4])]))
    assert None not in {other.ngrams for other in others}


def test_a_drafter_without_copies_is_itself(llama):
    drafter = SkipDrafter(llama, SkipSet(LAYERS), FixedLength(1))
    assert behind_copies(None, drafter) is drafter


@pytest.mark.parametrize("new", [[], [4]])
def test_a_text_of_next_to_nothing_has_no_copies_that_stand(llama, new):
    copies = Copies.of(record(llama, [4, 4, 4], [*new, 4]), NGrams(1))
    assert copies.stand[-1] == 0
    assert torch.tensor(copies.drafted).shape == (len(new) + 1,)
