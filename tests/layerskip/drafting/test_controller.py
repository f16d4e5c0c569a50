"""Proposals pause where they cost more time than they save."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, PromptLookup, Sampling, SkipSet, generate, make_drafter
from layerskip.costs import DraftRoundCosts
from layerskip.drafting.controller import ControlledDrafter, Controller
from layerskip.drafting.drafter import RoundResult
from layerskip.engine import Scored
from layerskip.errors import InvalidInputError
from layerskip.sampling import Draft, Verdict
from tests.layerskip.test_sampling_exactness import DOUBT, PLAIN, SKIPPED, distribution_of_texts, p_value, samples
from tests.layerskip.test_sampling_exactness import model as tiny_vocabulary  # noqa: F401
from tests.models import LAYERS, near_tie_or_same, transformers_greedy
from tests.strategies import skip_sets

# A draft step takes half a plain step, a verification of several tokens one and a half.
COSTS = DraftRoundCosts(
    (64, 512), tuple((0.5 * n, 0.5 * n) for n in range(9)), (1, 2, 24), ((1, 1), (1.5, 1.5), (1.5, 1.5))
)
EXPENSIVE = DraftRoundCosts((64, 512), ((0, 0), (9, 9)), (1, 24), ((1, 1), (9, 9)))
GAIN = 6.0  # the most that is saved up


def a_round(drafted, accepted):
    """The result of a round in which so many of so many tokens were accepted."""
    tokens = torch.zeros(drafted + 1, dtype=torch.long)
    verdict = Verdict([0] * (accepted + 1), tokens[:1], tuple(range(accepted + 1)))
    return RoundResult(Draft.certain([0] * drafted, tokens.device), verdict, tokens, Scored(tokens, tokens))


def proposals(controller, wanted, rounds, is_right):
    """How many tokens are proposed in each of some rounds, of which all or none are accepted."""
    proposed = []
    for number in range(rounds):
        count = controller.limit(wanted)
        proposed.append(count)
        if count:
            controller.observe(a_round(count, count if is_right(number) else 0), 64, drafted=count)
        else:
            controller.rest()
    return proposed


def test_proposals_grow_while_all_of_them_are_accepted():
    assert proposals(Controller(COSTS), 8, 6, lambda number: True) == [1, 2, 4, 8, 8, 8]


def test_without_costs_as_much_is_proposed_as_is_asked_for():
    assert proposals(Controller(None), 8, 40, lambda number: False) == [8] * 40


def test_of_a_source_that_is_never_right_little_is_lost():
    """A few rounds of one token, each after a pause of twice as many rounds as the one before."""
    proposed = proposals(Controller(COSTS), 8, 128, lambda number: False)
    assert set(proposed) == {0, 1}
    assert sum(proposed) <= 2 + math.log2(128 / 8)


@given(st.integers(1, 8), st.lists(st.booleans(), min_size=1, max_size=300))
@settings(max_examples=60)
def test_what_is_lost_in_a_text_is_bounded_whatever_is_right(wanted, right):
    """By what was saved up, and a round for each pause; pauses take at least as many rounds as the first one."""
    proposed = proposals(Controller(COSTS), wanted, len(right), lambda number: right[number])
    rounds = [(count, count + 1 if ok else 1) for count, ok in zip(proposed, right, strict=True) if count]
    gained = sum(tokens - (0.5 * count + 1.5) for count, tokens in rounds)
    worst_round = 0.5 * wanted + 0.5
    pauses = 1 + len(right) // 9
    assert gained >= -(GAIN + worst_round) * pauses


def test_a_source_that_is_right_again_is_used_again():
    controller = Controller(COSTS)
    proposals(controller, 8, 60, lambda number: False)
    proposed = proposals(controller, 8, 120, lambda number: True)
    assert proposed[-1] == 8
    assert sum(count > 0 for count in proposed) > 60


def test_a_new_text_waits_for_the_first_pause_at_most():
    controller = Controller(COSTS)
    proposals(controller, 8, 500, lambda number: False)
    controller.start()
    assert any(proposals(controller, 8, 9, lambda number: True))


def test_the_same_rounds_have_the_same_proposals():
    first, second = (proposals(Controller(COSTS), 8, 90, lambda number: number % 3 > 0) for _ in range(2))
    assert first == second


@given(skip_sets(), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sampled_from([COSTS, EXPENSIVE]))
@settings(max_examples=25)
def test_greedy_output_is_that_of_transformers(tiny, skip_set, prompt, costs):
    config = DraftConfig(skip_set, stopping=FixedLength(4), tree=(2,), prompt_lookup=PromptLookup(1, 6))
    drafter = make_drafter(tiny, config, costs=costs)
    for _ in range(2):  # what it learned in the first text has no part in the second
        ours = generate(tiny, prompt, drafter=drafter, max_new_tokens=24, eos_token_ids=[])
        near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, 24, set()))


def test_samples_follow_the_full_model(tiny_vocabulary):  # noqa: F811
    config = DraftConfig(SKIPPED, stopping=FixedLength(2), prompt_lookup=PromptLookup(1, 3))
    observed = samples(tiny_vocabulary, make_drafter(tiny_vocabulary, config, costs=COSTS), PLAIN)
    assert p_value(observed, distribution_of_texts(tiny_vocabulary, PLAIN)) > DOUBT


def test_a_draft_that_costs_more_than_it_can_give_is_hardly_used(llama):
    """The model's own stack as its draft, all of whose tokens stand, at ten times what it takes."""
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1))
    drafted = []
    for costs in (EXPENSIVE, COSTS):
        drafter = make_drafter(llama, config, costs=costs)
        drafted.append(generate(llama, [1, 2, 3], drafter=drafter, max_new_tokens=60, eos_token_ids=[]).stats.drafted)
    assert 0 < drafted[0] <= 4
    assert drafted[1] >= 20


def test_a_seed_gives_the_same_text_with_a_new_drafter(llama):
    config = DraftConfig(SkipSet(LAYERS, attention=(1,)), stopping=FixedLength(3))
    texts = [
        generate(
            llama,
            [1, 2, 3],
            drafter=make_drafter(llama, config, costs=COSTS),
            sampling=Sampling(1.0, seed=4),
            max_new_tokens=20,
        ).tokens
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_a_copy_has_a_controller_of_its_own(llama):
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1))
    one = make_drafter(llama, config, costs=EXPENSIVE)
    assert isinstance(one, ControlledDrafter)
    generate(llama, [1, 2], drafter=one, max_new_tokens=40, eos_token_ids=[])
    other = copy.copy(one)
    assert generate(llama, [1, 2], drafter=other, max_new_tokens=4, eos_token_ids=[]).stats.drafted


def test_costs_are_on_the_line_through_two_texts():
    costs = DraftRoundCosts((100, 200), ((0, 0), (1, 2)), (1, 4, 8), ((2, 2), (3, 4), (6, 5)))
    assert costs.plain_steps(100, places=1, tokens=2) == (1 + 3) / 2
    assert costs.plain_steps(300, places=1, tokens=4) == (3 + 5) / 2
    assert costs.plain_steps(50, places=0, tokens=1) == 1
    assert costs.plain_steps(900, places=9, tokens=8) == (9 + 5) / 2  # longer drafts count as the longest, noise stays
    assert costs.plain_steps(100, places=0, tokens=99) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (2, 4)}, "costs: expected drafting of at least no places, and widths ascending from 1"),
        ({"widths": (1,)}, "costs: expected a pair of seconds for each of 1 widths, got 2"),
        ({"drafting": ((0, -1),)}, "costs: expected numbers from 0 on, and plain steps that take some time"),
    ],
)
def test_costs_that_cannot_be_are_refused(change, message):
    fields = {"contexts": (1, 2), "drafting": ((0, 0),), "widths": (1, 4), "verification": ((1, 1), (2, 2))}
    with pytest.raises(InvalidInputError) as error:
        DraftRoundCosts(**fields | change)
    assert str(error.value) == message
