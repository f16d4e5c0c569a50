"""The search space: candidates as Optuna's parameters and back, and the policies that replay tries."""

import json

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import search.space as space_module
from layerskip import FixedLength, SkipSet
from layerskip.drafting.prompt_lookup import PromptLookup
from layerskip.errors import InvalidInputError
from search.draft_layers import DraftLayerRef
from search.space import Candidate, Policy, SearchSpace
from tests.models import LAYERS as TINY
from tests.models import VOCABULARY
from tests.strategies import branches, draft_exits, fractions, skip_sets

LAYERS = st.integers(1, 40)


@st.composite
def spaces(draw):
    num_layers = draw(LAYERS)
    return SearchSpace(
        num_layers,
        max_draft_length=draw(st.integers(1, 12)),
        bridges=draw(st.booleans()),
        vocabularies=draw(st.sampled_from([(0,), (0, 8192), (0, 8192, 16384), (8192,)])),
        gates=draw(st.sampled_from([(0.0,), (0.0, 0.3)])),
        trees=draw(st.sampled_from([(), (7,), (3, 7)])),
        ngrams=draw(st.booleans()),
        stand_ins=draw(stand_ins(num_layers)),
    )


def stand_ins(num_layers):
    """None, or a few trained ones, each with something kept below it."""
    each = st.builds(
        DraftLayerRef,
        st.integers(1, 2 * num_layers - 1),
        st.just(2 * num_layers),
        st.sampled_from(["layer", "bridge"]),
        st.sampled_from([0, 8192]),
        st.text("0123456789abcdef", min_size=16, max_size=16),
    )
    return st.lists(each, max_size=3, unique=True).map(tuple)


@st.composite
def spaces_with_candidates(draw):
    space = draw(spaces())
    return space, draw(candidates(space, skip_sets(space.num_layers)))


@st.composite
def candidates(draw, space, drawn_skip_sets):
    """Candidates of a space; those that would keep nothing below their stand-in go without."""
    skip_set, bridged = draw(drawn_skip_sets), draw(st.booleans()) if space.bridges else False
    stand_in = draw(st.sampled_from([None, *space.stand_ins]))
    if stand_in is not None and all(skip_set.mask[: stand_in.start]):
        stand_in = None
    return Candidate(skip_set, bridged, draw(st.sampled_from(space.vocabularies)), stand_in)


@given(spaces_with_candidates())
def test_a_candidate_survives_the_way_through_parameters(drawn):
    space, candidate = drawn
    assert space.candidate(space.parameters(candidate)) == candidate


@given(spaces_with_candidates())
def test_a_candidate_survives_the_way_through_the_database(drawn):
    space, candidate = drawn
    parameters = json.loads(json.dumps(space.parameters(candidate)))
    assert space.candidate(parameters) == candidate


@given(spaces_with_candidates(), st.data())
def test_different_candidates_have_different_parameters(drawn, data):
    space, candidate = drawn
    other = data.draw(candidates(space, skip_sets(space.num_layers) | st.just(candidate.skip_set)))
    assert (space.parameters(candidate) == space.parameters(other)) == (candidate == other)


@given(spaces_with_candidates())
@settings(max_examples=50)
def test_a_trial_that_is_told_what_to_try_tries_it(drawn):
    space, candidate = drawn
    study = optuna.create_study()
    study.enqueue_trial(space.parameters(candidate))
    trial = study.ask()
    assert space.suggest(trial) == candidate
    assert trial.params == space.parameters(candidate)


@given(spaces(), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_whatever_a_sampler_chooses_lies_in_the_space(space, seed):
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)).ask()
    try:
        candidate = space.suggest(trial)
    except InvalidInputError:  # refused, as the next test says
        number = trial.params.get("stand_in", 0)
        below = space.stand_ins[number - 1].start if number else None
        assert all(trial.params[name] for name in space.bit_names()[:below])
        return
    assert candidate == space.candidate(trial.params)
    assert candidate.stand_in in (None, *space.stand_ins)
    assert candidate.skip_set.num_layers == space.num_layers
    assert candidate.vocabulary in space.vocabularies
    assert space.bridges or not candidate.bridged


@given(LAYERS)
def test_skipping_every_sublayer_is_refused(num_layers):
    space = SearchSpace(num_layers)
    with pytest.raises(InvalidInputError, match="skip"):
        space.candidate(dict.fromkeys(space.bit_names(), 1))


def test_parameter_names_are_those_that_studies_of_earlier_versions_have():
    candidate = Candidate(SkipSet(11, attention=(0, 10), mlp=(3,)), bridged=True, vocabulary=8192)
    parameters = SearchSpace(11, bridges=True, vocabularies=(0, 8192)).parameters(candidate)
    assert list(parameters)[:3] == ["skip_attn_00", "skip_mlp_00", "skip_attn_01"]
    assert {name for name, value in parameters.items() if value == 1} == {
        *("skip_attn_00", "skip_attn_10", "skip_mlp_03"),
        "bridged",
    }
    assert {name: parameters[name] for name in list(parameters)[22:]} == {"bridged": True, "vocabulary": 8192}
    assert SearchSpace(10).bit_names()[0] == "skip_attn_0"


@given(spaces())
def test_policies_are_different_and_as_long_as_allowed(space):
    policies = space.policies()
    assert len(set(policies)) == len(policies)
    assert {policy.gate for policy in policies} == set(space.gates)
    lengths = {policy.draft_exit.new_state().max_length for policy in policies}
    assert lengths == set(range(1, space.max_draft_length + 1))
    assert {policy.draft_exit.kind for policy in policies} == {"fixed", "confidence", "adaptive"}


@given(draft_exits(), fractions, branches(), st.sampled_from([None, PromptLookup(1, 2, 3)]))
def test_a_policy_survives_the_way_through_the_database(draft_exit, gate, widths, ngrams):
    policy = Policy(draft_exit, gate, widths, ngrams)
    assert Policy.from_json(policy.as_json()) == policy


@given(spaces(), spaces())
def test_two_spaces_have_one_description_exactly_if_they_are_equal(one, other):
    assert (one.describe() == other.describe()) == (one == other)
    assert SearchSpace(**json.loads(json.dumps(one.describe()))) == one


def test_a_space_has_what_it_is_asked_for(llama, monkeypatch):
    monkeypatch.setattr(space_module, "_VOCABULARIES", (VOCABULARY // 2, 10**6))
    everything = SearchSpace.of(llama)
    assert (everything.bridges, everything.vocabularies) == (True, (0, VOCABULARY // 2))
    assert everything.gates[0] == 0
    assert len(everything.gates) > 1
    assert SearchSpace.of(
        llama, bridges=False, vocabulary=False, gate=False, branches=False, ngrams=False
    ) == SearchSpace(TINY)


def test_candidates_and_policies_read_as_what_they_are():
    skip_set = SkipSet(9, attention=(3, 5, 6, 7), mlp=(2,))
    assert str(Candidate(skip_set)) == "attn 3,5-7 · mlp 2"
    assert str(Candidate(skip_set, bridged=True, vocabulary=64)) == "attn 3,5-7 · mlp 2 · bridged · vocabulary 64"
    assert str(Policy(FixedLength(4))) == "4 tokens"
    assert str(Policy(FixedLength(4), 0.3)) == "4 tokens, gate 0.3"
