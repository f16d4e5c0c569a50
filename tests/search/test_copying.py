"""What copying brings, foretold: as in real decoding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, SkipSet, generate
from layerskip.drafting.prompt_lookup import PromptLookup, PromptLookupDrafter
from layerskip.target_texts import batch_generate
from search.copying import Copies, settings_of_ngrams, with_copies
from search.reference import record
from search.replay import SimulatedSpeedup
from tests.models import LAYERS

ngrams = st.builds(lambda least, more, length: PromptLookup(least, least + more, length), *[st.integers(1, 3)] * 3)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), ngrams, st.integers(2, 14))
@settings(max_examples=40)
def test_copies_along_a_text_are_those_of_decoding(tiny, prompt, one, length):
    """Played round by round, they draft and accept what a drafter of copies does."""
    [new] = batch_generate(tiny, [prompt], length)
    copies = Copies.of(record(tiny, prompt, new), one)
    place = drafted = accepted = 0
    while place < len(new) - 1:
        proposed = min(copies.drafted[place], length - place - 2)
        stood = min(proposed, copies.stand[place])
        drafted, accepted, place = drafted + proposed, accepted + stood, place + stood + 1
    stats = generate(tiny, prompt, drafter=PromptLookupDrafter(one), max_new_tokens=length).stats
    assert (stats.drafted, stats.accepted) == (drafted, accepted)


def foretold(config, seconds):
    return SimulatedSpeedup(config, 40 / sum(seconds), None, tuple(seconds))


BEST = foretold(DraftConfig(SkipSet(LAYERS), stopping=FixedLength(2)), [10.0, 10.0, 10.0, 10.0])


@pytest.mark.parametrize(
    ("seconds", "pays"),
    [
        ([9.0, 8.8, 9.2, 9.1], True),
        ([1.0, 10.1, 10.1, 10.1], False),  # one text that repeats itself
        ([10.0, 10.0, 10.0, 10.0], False),
        ([11.0, 11.0, 11.0, 11.0], False),
    ],
)
def test_copies_are_made_where_they_save_time_over_the_texts_one_by_one(seconds, pays):
    found = with_copies(BEST, lambda config: foretold(config, seconds))
    assert (found.config.prompt_lookup is not None) == pays
    assert found.config == BEST.config or replace(found.config, prompt_lookup=None) == BEST.config


def test_of_copies_that_pay_the_fastest_are_made():
    longer = {ngrams: 9.0 - 0.1 * ngrams.length for ngrams in settings_of_ngrams()}
    found = with_copies(
        BEST, lambda config: foretold(config, [longer[config.prompt_lookup] + 0.01 * n for n in range(4)])
    )
    assert found.config.prompt_lookup.length == max(ngrams.length for ngrams in longer)


@pytest.mark.parametrize("new", [[], [4]])
def test_a_text_of_next_to_nothing_has_no_copies_that_stand(llama, new):
    copies = Copies.of(record(llama, [4, 4, 4], [*new, 4]), PromptLookup(1))
    assert copies.stand[-1] == 0
    assert torch.tensor(copies.drafted).shape == (len(new) + 1,)
