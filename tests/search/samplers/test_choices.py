"""Drafts as the parameters of a trial and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip import SkipSet
from search.draft_layers import DraftLayerRef
from search.samplers import Draft, DraftChoices
from search.space import Candidate, SearchSpace
from tests.search.samplers.problems import ALL_KINDS, bits


@pytest.mark.parametrize("choices", ALL_KINDS)
@given(data=st.data())
def test_a_draft_survives_the_way_through_parameters(choices, data):
    extras = data.draw(st.sampled_from(list(choices.extras)))
    mask = tuple(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    draft = choices.effective(Draft(mask, *extras))
    parameters = choices.parameters(draft)
    assert choices.draft(parameters | {"another": 1}) == draft
    assert parameters.keys() == choices.distributions.keys()
    for name, distribution in choices.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(parameters[name]))


@pytest.mark.parametrize("choices", ALL_KINDS)
def test_a_trial_that_did_not_choose_everything_tried_nothing(choices):
    parameters = choices.parameters(Draft((True, False) * 3, *next(choices.extras)))
    for name in parameters:
        assert choices.draft({other: value for other, value in parameters.items() if other != name}) is None


def test_the_parameters_are_those_of_the_search_space():
    stand_ins = (DraftLayerRef(2, 6, "layer", 0, "a"), DraftLayerRef(3, 6, "bridge", 8, "b"))
    space = SearchSpace(3, bridges=True, vocabularies=(0, 8), stand_ins=stand_ins)
    candidate = Candidate(SkipSet(3, (1,), (2,)), bridged=True, vocabulary=8, stand_in=stand_ins[1])
    parameters = space.parameters(candidate)
    names = tuple(name for name in parameters if name.startswith("skip_"))
    choices = DraftChoices(names, space.bridges, space.vocabularies, tuple(one.start for one in stand_ins))
    assert choices.draft(parameters) == Draft(candidate.skip_set.mask, True, 8, 2)


@given(st.lists(st.booleans(), min_size=6, max_size=6).map(tuple), st.integers(0, 2))
def test_two_drafts_are_one_exactly_if_they_differ_in_nothing_that_runs(mask, stand_in):
    choices = DraftChoices(bits(6), exits=(2, 5))
    draft = choices.draft(choices.parameters(Draft(mask, stand_in=stand_in)))
    for index in range(6):
        flipped = tuple(skip != (other == index) for other, skip in enumerate(mask))
        other = choices.draft(choices.parameters(Draft(flipped, stand_in=stand_in)))
        assert (other == draft) == (index >= choices.free(stand_in))
