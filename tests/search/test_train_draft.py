"""Parts of training a draft that decide what is measured: early exits, traces along a text, and policies."""

import pytest
import torch

from layerskip import DraftConfig, FixedLength, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine, measure_costs
from layerskip.errors import InvalidInputError
from layerskip.target_texts import batch_generate
from search.head_costs import HeadCosts
from search.reference import record
from search.space import SearchSpace
from search.traces import trace_early_exit
from search.train_draft import space_for, trained_policy_choice
from search.untrained_drafts import exit_of
from tests.models import LAYERS, random_heads, random_layers

TOP = 2 * LAYERS


class Followed(LayerSkipDrafter):
    """Keeps for each proposal how much of the answer was verified, and whether the proposal was accepted."""

    def start(self, engine, prompt, states):
        super().start(engine, prompt, states)
        self.verified, self.taken = 0, {}

    def observe(self, outcome):
        super().observe(outcome)
        accepted = outcome.verdict.accepted
        if len(outcome.draft):
            self.taken[self.verified] = bool(accepted)
        self.verified += accepted + 1


@pytest.mark.parametrize("token_ids", [None, torch.arange(3, 50)], ids=["whole vocabulary", "draft vocabulary"])
def test_a_trace_says_what_is_accepted_in_decoding(tiny, token_ids):
    layers = random_layers(tiny, {TOP - 2: TOP}, like=LAYERS - 1, seed=2)
    assets = DraftWeights(token_ids=token_ids, layers=layers)
    drafter = Followed(tiny, DraftConfig(SkipSet.early_exit(LAYERS, LAYERS - 1), stopping=FixedLength(1)), assets)
    agrees = []
    for first in range(4):
        prompt = [first, 7, 5]
        [new] = batch_generate(tiny, [prompt], 16)
        [trace] = trace_early_exit(tiny, drafter._stack, [record(tiny, prompt, new)])
        generate(tiny, prompt, drafter=drafter, max_new_tokens=16, eos_token_ids=[])
        assert len(trace.agrees) == 15
        assert (trace.confidence > 0).all()
        assert (trace.confidence <= 1).all()
        for position, taken in drafter.taken.items():
            assert trace.agrees[position] == taken
        agrees += trace.agrees.tolist()
    assert True in agrees
    assert False in agrees


def test_an_early_exit_and_its_layers_are_each_others_inverse():
    for layers in range(1, LAYERS):
        assert exit_of(SkipSet.early_exit(LAYERS, layers)) == layers


@pytest.mark.parametrize(
    "skip_set",
    [SkipSet(LAYERS), SkipSet(LAYERS, (1,), (1,)), SkipSet(LAYERS, (3,), (2, 3)), SkipSet(LAYERS, (1, 3), (1, 3))],
    ids=str,
)
def test_what_keeps_something_above_is_no_early_exit(skip_set):
    with pytest.raises(InvalidInputError, match="is no early exit"):
        exit_of(skip_set)


def best_policy(model, skip_set, weights, space, new):
    """On one text that continues with these tokens, where drafting itself costs nothing."""
    space, engine = space_for(weights, space), EagerEngine(model)
    costs = measure_costs(engine, vocabularies=space.vocabulary_sizes, most_drafted=space.most_drafted)
    head_costs = HeadCosts(0.0, [[0.0]] * weights.heads.count, [1]) if weights.heads else None
    texts = [record(model, [1, 2], new)]
    limit = len(new)
    choice = trained_policy_choice(engine, skip_set, weights, space, texts, costs, head_costs, max_new_tokens=limit)
    return choice.best().config


@pytest.mark.parametrize(
    "space", [SearchSpace(LAYERS, tree_sizes=(3, 7, 15, 23)), SearchSpace(LAYERS)], ids=["trees", "chains"]
)
def test_drafts_of_any_number_of_heads_have_a_best_policy(tiny, space):
    """Also of more heads than the largest tree of a search has tokens."""
    weights = DraftWeights(token_ids=torch.arange(3, 50), heads=random_heads(tiny, "hydra", 26))
    policy = best_policy(tiny, SkipSet(LAYERS), weights, space, [3] * 40)
    assert 1 <= policy.stopping.new_state().max_length <= 26
    assert policy.vocabulary_size == 47


@pytest.mark.parametrize("kind", ["heads", "layer"])
def test_prompt_lookup_is_part_of_a_policy_only_where_the_space_has_it(tiny, kind):
    """Of a text that says the same over and over, to a draft that is never right."""
    never = torch.arange(50, 60)
    if kind == "heads":
        skip_set, weights = SkipSet(LAYERS), DraftWeights(token_ids=never, heads=random_heads(tiny, "hydra", 2))
    else:
        skip_set = SkipSet.early_exit(LAYERS, LAYERS - 1)
        weights = DraftWeights(token_ids=never, layers=random_layers(tiny, {TOP - 2: TOP}))
    spaces = [SearchSpace(LAYERS, prompt_lookup=lookup) for lookup in (True, False)]
    found = [best_policy(tiny, skip_set, weights, space, [3] * 60) for space in spaces]
    assert [policy.prompt_lookup is not None for policy in found] == [True, False]
    assert all(policy.skip_set == skip_set for policy in found)
