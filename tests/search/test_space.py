"""The search space: candidates as Optuna's parameters and back."""

import json

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import AdaptiveThreshold, ConfidenceThreshold, FixedLength, InvalidInputError, SkipSet
from search.space import Candidate, SearchSpace
from tests.strategies import skip_sets

LAYERS = st.integers(1, 40)


@st.composite
def spaces_with_candidates(draw):
    num_layers = draw(LAYERS)
    space = SearchSpace(num_layers, max_draft_length=draw(st.integers(1, 12)))
    length = st.integers(1, space.max_draft_length)
    threshold = st.floats(space.lowest_threshold, space.highest_threshold)
    draft_exit = draw(
        st.builds(FixedLength, length)
        | st.builds(ConfidenceThreshold, threshold, length)
        | st.builds(AdaptiveThreshold, threshold, length)
    )
    return space, Candidate(draw(skip_sets(num_layers)), draft_exit)


@given(spaces_with_candidates())
def test_a_candidate_survives_the_way_through_parameters(drawn):
    space, candidate = drawn
    assert space.candidate(space.parameters(candidate)) == candidate


@given(spaces_with_candidates())
def test_a_candidate_survives_the_way_through_the_database(drawn):
    space, candidate = drawn
    parameters = json.loads(json.dumps(space.parameters(candidate)))
    assert space.candidate(parameters) == candidate


@given(spaces_with_candidates(), spaces_with_candidates())
def test_different_candidates_have_different_parameters(one, other):
    (space, candidate), (_, second) = one, other
    if candidate.skip_set.num_layers == second.skip_set.num_layers:
        assert (space.parameters(candidate) == space.parameters(second)) == (candidate == second)


@given(spaces_with_candidates())
@settings(max_examples=50)
def test_a_trial_that_is_told_what_to_try_tries_it(drawn):
    space, candidate = drawn
    study = optuna.create_study()
    study.enqueue_trial(space.parameters(candidate))
    trial = study.ask()
    assert space.suggest(trial) == candidate
    assert trial.params == space.parameters(candidate)


@given(LAYERS, st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_whatever_a_sampler_chooses_lies_in_the_space(num_layers, max_draft_length, seed):
    space = SearchSpace(num_layers, max_draft_length, lowest_threshold=0.3, highest_threshold=0.4)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)).ask()
    try:
        candidate = space.suggest(trial)
    except InvalidInputError:  # refused, as the next test says
        assert all(trial.params.values())
        return
    assert candidate.skip_set.num_layers == num_layers
    assert candidate == space.candidate(trial.params)
    match candidate.draft_exit:
        case FixedLength(length):
            assert 1 <= length <= max_draft_length
        case ConfidenceThreshold(threshold, length) | AdaptiveThreshold(threshold, length):
            assert 1 <= length <= max_draft_length
            assert 0.3 <= threshold <= 0.4


@given(LAYERS)
def test_skipping_every_sublayer_is_refused(num_layers):
    space = SearchSpace(num_layers)
    kept_one = space.parameters(Candidate(SkipSet(num_layers, mlp=tuple(range(num_layers))), FixedLength(1)))
    bits = {name: 1 for name in kept_one if name.startswith("skip_")}
    assert len(bits) == 2 * num_layers
    with pytest.raises(InvalidInputError, match="skip"):
        space.candidate(kept_one | bits)


def test_parameter_names_are_those_that_studies_of_earlier_versions_have():
    candidate = Candidate(SkipSet(11, attention=(0, 10), mlp=(3,)), ConfidenceThreshold(0.5, 4))
    parameters = SearchSpace(11).parameters(candidate)
    assert list(parameters)[:3] == ["skip_attn_00", "skip_mlp_00", "skip_attn_01"]
    assert {name for name, value in parameters.items() if value == 1} == {"skip_attn_00", "skip_attn_10", "skip_mlp_03"}
    assert {name: parameters[name] for name in list(parameters)[22:]} == {
        "exit": "confidence",
        "draft_length": 4,
        "threshold": 0.5,
    }
    assert next(iter(SearchSpace(10).parameters(Candidate(SkipSet(10), FixedLength(1))))) == "skip_attn_0"


def test_only_what_stops_by_confidence_has_a_threshold():
    space = SearchSpace(3)
    exits = {"fixed": FixedLength(2), "confidence": ConfidenceThreshold(), "adaptive": AdaptiveThreshold()}
    for kind, draft_exit in exits.items():
        parameters = space.parameters(Candidate(SkipSet(3), draft_exit))
        assert parameters["exit"] == kind
        assert ("threshold" in parameters) == (kind != "fixed")


@given(LAYERS, LAYERS, st.integers(1, 9), st.integers(1, 9))
def test_two_spaces_have_one_description_exactly_if_they_are_equal(layers, other_layers, length, other_length):
    one, other = SearchSpace(layers, length), SearchSpace(other_layers, other_length)
    assert (one.describe() == other.describe()) == (one == other)
    assert SearchSpace(**json.loads(json.dumps(one.describe()))) == one


def test_a_candidate_reads_as_what_it_skips_and_when_it_stops():
    candidate = Candidate(SkipSet(9, attention=(3, 5, 6, 7), mlp=(2,)), FixedLength(4))
    assert str(candidate) == "attn 3,5-7 · mlp 2 · draft 4 tokens"
