"""The search space: candidates as Optuna's parameters and back, and the policies that replay tries."""

import json
from dataclasses import replace

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import search.space as space_module
from layerskip import SkipSet
from layerskip.drafting.config import DraftConfig, DraftLayerRef
from layerskip.drafting.prompt_lookup import PromptLookup
from layerskip.errors import InvalidInputError
from search.space import SearchSpace
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
        precisions=draw(st.sampled_from([("full",), ("full", "int8", "int4"), ("int4",)])),
        bridges=draw(st.booleans()),
        vocabulary_sizes=draw(st.sampled_from([(0,), (0, 8192), (0, 8192, 16384), (8192,)])),
        target_confidence_thresholds=draw(st.sampled_from([(0.0,), (0.0, 0.3)])),
        tree_sizes=draw(st.sampled_from([(), (7,), (3, 7)])),
        prompt_lookup=draw(st.booleans()),
        draft_layers=draw(draft_layers(num_layers)),
    )


def draft_layers(num_layers):
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
    """Candidates of a space; those that would keep nothing below their draft layer go without."""
    skip_set, bridges = draw(drawn_skip_sets), draw(st.booleans()) if space.bridges else False
    layer = draw(st.sampled_from([None, *space.draft_layers]))
    if layer is not None and all(skip_set.mask[: layer.start]):
        layer = None
    size, precision = draw(st.sampled_from(space.vocabulary_sizes)), draw(st.sampled_from(space.precisions))
    return DraftConfig(skip_set, bridges, layer, size, precision=precision)


@given(spaces_with_candidates())
def test_a_candidate_survives_the_way_through_parameters(drawn):
    space, candidate = drawn
    assert space.config(space.parameters(candidate)) == candidate


@given(spaces_with_candidates())
def test_a_candidate_survives_the_way_through_the_database(drawn):
    space, candidate = drawn
    parameters = json.loads(json.dumps(space.parameters(candidate)))
    assert space.config(parameters) == candidate


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
        number = trial.params.get("draft_layer", 0)
        below = space.draft_layers[number - 1].start if number else None
        assert all(trial.params[name] for name in space.bit_names[:below])
        return
    assert candidate == space.config(trial.params)
    assert candidate.draft_layer in (None, *space.draft_layers)
    assert candidate.skip_set.num_layers == space.num_layers
    assert candidate.vocabulary_size in space.vocabulary_sizes
    assert space.bridges or not candidate.bridges


@given(LAYERS)
def test_skipping_every_sublayer_is_refused(num_layers):
    space = SearchSpace(num_layers)
    with pytest.raises(InvalidInputError, match="skip"):
        space.config(dict.fromkeys(space.bit_names, 1))


def test_parameters_are_named_by_what_they_choose():
    candidate = DraftConfig(SkipSet(11, attention=(0, 10), mlp=(3,)), bridges=True, vocabulary_size=8192)
    parameters = SearchSpace(11, bridges=True, vocabulary_sizes=(0, 8192)).parameters(candidate)
    assert list(parameters)[:3] == ["skip_attn_00", "skip_mlp_00", "skip_attn_01"]
    assert {name for name, value in parameters.items() if value == 1} == {
        *("skip_attn_00", "skip_attn_10", "skip_mlp_03"),
        "bridges",
    }
    assert {name: parameters[name] for name in list(parameters)[22:]} == {"bridges": True, "vocabulary_size": 8192}
    assert SearchSpace(10).bit_names[0] == "skip_attn_0"


@given(spaces())
def test_policies_are_different_and_as_long_as_allowed(space):
    policies = space.policies(DraftConfig(SkipSet(space.num_layers)))
    assert len(set(policies)) == len(policies)
    assert {policy.target_confidence_threshold for policy in policies} == set(space.target_confidence_thresholds)
    lengths = {policy.stopping.new_state().max_length for policy in policies}
    assert lengths == set(range(1, space.max_draft_length + 1))
    assert {policy.stopping.kind for policy in policies} == {"fixed", "confidence", "adaptive"}


@given(draft_exits(), fractions, branches(), st.sampled_from([None, PromptLookup(1, 3)]))
def test_a_policy_survives_the_way_through_the_database(draft_exit, gate, widths, ngrams):
    layer = DraftLayerRef(4, 8, "layer", 64, "a")
    config = DraftConfig(SkipSet(4), True, layer, 64, draft_exit, gate, widths, ngrams, "int8")
    assert DraftConfig.from_json(config.to_json()) == config


@given(spaces(), spaces())
def test_two_spaces_have_one_description_exactly_if_they_are_equal(one, other):
    assert (one.describe() == other.describe()) == (one == other)
    assert SearchSpace(**json.loads(json.dumps(one.describe()))) == one


def test_a_space_has_what_it_is_asked_for(llama, monkeypatch):
    monkeypatch.setattr(space_module, "_VOCABULARY_SIZES", (VOCABULARY // 2, 10**6))
    everything = SearchSpace.of(llama)
    assert (everything.bridges, everything.vocabulary_sizes) == (True, (0, VOCABULARY // 2))
    assert everything.target_confidence_thresholds[0] == 0
    assert len(everything.target_confidence_thresholds) > 1
    assert everything.precisions == ("full", "int8", "int4")
    nothing = ("bridges", "vocabularies", "target_confidence", "trees", "prompt_lookup")
    assert SearchSpace.of(llama, precisions=["full"], **dict.fromkeys(nothing, False)) == SearchSpace(TINY)


def test_configurations_read_as_what_they_are():
    skip_set = SkipSet(9, attention=(3, 5, 6, 7), mlp=(2,))
    assert str(DraftConfig(skip_set)) == "attn 3,5-7 · mlp 2 · 4 tokens"
    rich = DraftConfig(skip_set, bridges=True, vocabulary_size=64, target_confidence_threshold=0.3, tree=(3, (2, 1)))
    assert rich.details == "4 tokens; tree 3-2+1; no draft where target confidence < 0.3 · bridges · vocabulary 64"


@pytest.mark.parametrize(
    "space",
    [
        SearchSpace(3, bridges=True, vocabulary_sizes=(0, 8), draft_layers=(DraftLayerRef(2, 6, "layer", 0, "a"),)),
        SearchSpace(3),
    ],
)
def test_a_trial_that_did_not_choose_everything_tried_nothing(space):
    parameters = space.parameters(DraftConfig(SkipSet(3, (1,), (2,))))
    assert space.config_or_none(parameters | {"another": 1}) == DraftConfig(SkipSet(3, (1,), (2,)))
    for name in parameters:
        assert space.config_or_none({other: value for other, value in parameters.items() if other != name}) is None
    assert space.config_or_none(parameters | dict.fromkeys(space.bit_names, 1)) is None


@given(spaces_with_candidates())
def test_parameters_are_those_that_are_described(drawn):
    space, candidate = drawn
    parameters = space.parameters(candidate)
    assert parameters.keys() == space.distributions.keys()
    for name, distribution in space.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(parameters[name]))


@given(spaces_with_candidates(), st.data())
def test_two_candidates_are_one_exactly_if_they_differ_in_nothing_that_runs(drawn, data):
    space, candidate = drawn
    index = data.draw(st.integers(0, 2 * space.num_layers - 1))
    flipped = [skip != (other == index) for other, skip in enumerate(candidate.skip_set.mask)]
    if not all(flipped[: candidate.exit_at]):
        other = replace(candidate, skip_set=SkipSet.from_mask(flipped))
        assert (other == candidate) == (index >= candidate.exit_at)


@given(spaces())
def test_options_are_all_different_and_skip_what_their_draft_layer_replaces(space):
    options = space.options
    layers = len(space.draft_layers) + 1
    others = (1 + space.bridges) * len(space.vocabulary_sizes) * len(space.precisions)
    assert len(set(options)) == len(options) == others * layers
    assert not any(len(config.skipped_below) for config in options)
