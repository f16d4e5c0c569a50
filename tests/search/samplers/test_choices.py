"""Drafts as the parameters of a trial and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip import SkipSet
from search.samplers import Draft, DraftChoices
from search.space import Candidate, SearchSpace
from tests.search.samplers.problems import ALL_KINDS


@pytest.mark.parametrize("choices", ALL_KINDS)
@given(data=st.data())
def test_a_draft_survives_the_way_through_parameters(choices, data):
    bridged, vocabulary = data.draw(st.sampled_from(list(choices.extras)))
    mask = tuple(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    draft = Draft(mask, bridged, vocabulary)
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
    space = SearchSpace(3, bridges=True, vocabularies=(0, 8))
    candidate = Candidate(SkipSet(3, (1,), (2,)), bridged=True, vocabulary=8)
    parameters = space.parameters(candidate)
    names = tuple(name for name in parameters if name.startswith("skip_"))
    choices = DraftChoices(names, space.bridges, space.vocabularies)
    assert choices.draft(parameters) == Draft(candidate.skip_set.mask, True, 8)
