"""Proposals pause where they cost more time than they save."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, PromptLookup, Sampling, SkipSet, generate, make_drafter
from layerskip.costs import DraftRoundCosts
from layerskip.drafting.controller import ControlledDrafter, Controller
from layerskip.errors import InvalidInputError
from layerskip.utils import device_name
from tests.layerskip.test_sampling_exactness import DOUBT, PLAIN, SKIPPED, distribution_of_texts, p_value, samples
from tests.layerskip.test_sampling_exactness import model as tiny_vocabulary  # noqa: F401
from tests.models import LAYERS, near_tie_or_same, transformers_greedy
from tests.strategies import skip_sets

WHERE = ("this device", "float32", "eager", (64, 512))
# A draft step takes half a plain step, a verification of several tokens 1.7: a single drafted token gains nothing.
DRAFTING = tuple((0.5 * places, 0.5 * places) for places in range(9))
COSTS = DraftRoundCosts(*WHERE, DRAFTING, DRAFTING, (1, 2, 24), ((1, 1), (1.7, 1.7), (1.7, 1.7)))
FREE = DraftRoundCosts(*WHERE, ((0, 0),), ((0, 0),), (1, 24), ((1, 1), (1, 1)))
EXPENSIVE = DraftRoundCosts(*WHERE, ((0, 0), (9, 9)), ((0, 0), (0, 0)), (1, 24), ((1, 1), (9, 9)))
MOST_CREDIT = 6.0


def measured_here(costs):
    """The same, as if measured on this device, whose name says how many threads a test has."""
    return replace(costs, device=device_name(torch.device("cpu")))


def gain(proposed, accepted):
    """Of a round at these costs."""
    return accepted + 1 - COSTS.plain_steps(64, places=proposed, tokens=proposed + 1)


def proposals(controller, wanted, rounds, is_right):
    """How many tokens are proposed in each of some rounds, of which all or none are accepted."""
    proposed = []
    for number in range(rounds):
        count = controller.limit(wanted)
        proposed.append(count)
        if count:
            accepted = count if is_right(number) else 0
            controller.observe(gain(count, accepted), proposed=count, accepted=accepted)
        else:
            controller.rest()
    return proposed


def test_proposals_grow_while_all_of_them_are_accepted():
    assert proposals(Controller(), 20, 5, lambda number: True) == [4, 8, 16, 20, 20]


def test_of_a_source_that_is_never_right_little_is_lost():
    """A first round, and a few of one token, each after a pause of twice as many rounds as the one before."""
    proposed = proposals(Controller(), 8, 128, lambda number: False)
    assert proposed[0] == 4
    assert set(proposed[1:]) == {0, 1}
    assert sum(map(bool, proposed)) <= 2 + math.log2(128 / 8)


@given(st.integers(1, 8), st.lists(st.booleans(), min_size=1, max_size=300))
@settings(max_examples=60)
def test_what_is_lost_in_a_text_is_bounded_whatever_is_right(wanted, right):
    """By what was saved up and a losing round for each pause, which takes at least as many rounds as the first one."""
    proposed = proposals(Controller(), wanted, len(right), lambda number: right[number])
    gained = sum(gain(count, count * ok) for count, ok in zip(proposed, right, strict=True) if count)
    pauses = 1 + len(right) // 9
    assert gained >= (gain(wanted, 0) - MOST_CREDIT) * pauses


def test_a_source_that_is_right_again_is_used_again():
    controller = Controller()
    proposals(controller, 8, 60, lambda number: False)
    proposed = proposals(controller, 8, 120, lambda number: True)
    assert proposed[-1] == 8
    assert sum(count > 0 for count in proposed) > 50


def test_a_new_text_waits_for_the_first_pause_at_most():
    controller = Controller()
    proposals(controller, 8, 500, lambda number: False)
    controller.start()
    assert any(proposals(controller, 8, 9, lambda number: True))


@given(skip_sets(), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sampled_from([COSTS, EXPENSIVE]))
@settings(max_examples=25)
def test_greedy_output_is_that_of_transformers(tiny, skip_set, prompt, costs):
    config = DraftConfig(skip_set, stopping=FixedLength(4), tree=(2,), prompt_lookup=PromptLookup(1, 6))
    drafter = make_drafter(tiny, config, costs=measured_here(costs))
    for _ in range(2):  # what it learned in the first text has no part in the second
        ours = generate(tiny, prompt, drafter=drafter, max_new_tokens=24, eos_token_ids=[])
        near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, 24, set()))


def test_samples_follow_the_full_model(tiny_vocabulary):  # noqa: F811
    config = DraftConfig(SKIPPED, stopping=FixedLength(2), prompt_lookup=PromptLookup(1, 3))
    drafter = make_drafter(tiny_vocabulary, config, costs=measured_here(FREE))
    observed = samples(tiny_vocabulary, drafter, PLAIN)
    assert drafter._controller.limit(3) == 3  # it never paused
    assert p_value(observed, distribution_of_texts(tiny_vocabulary, PLAIN)) > DOUBT


def test_copies_that_are_wrong_do_not_pause_the_draft_that_they_continue(llama):
    """The model's own stack drafts; a corpus continues each draft with a token that never follows."""
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(4))
    plain = generate(llama, [5, 9], max_new_tokens=40, eos_token_ids=[]).tokens
    never = next(token for token in range(50) if token not in plain)
    corpus = [part for token in dict.fromkeys(plain) for part in (token, never)]
    drafter = make_drafter(
        llama, replace(config, prompt_lookup=PromptLookup(1, 9)), costs=measured_here(COSTS), corpus=corpus
    )
    stats = generate(llama, [5, 9], drafter=drafter, max_new_tokens=40, eos_token_ids=[]).stats
    assert drafter._controller._pause > 8
    assert drafter._drafter._controller._pause == 8
    assert stats.accepted > 10


def test_a_draft_that_costs_more_than_it_can_give_is_hardly_used(llama):
    """The model's own stack as its draft, all of whose tokens stand, at ten times what it takes."""
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1))
    drafted = []
    for costs in (EXPENSIVE, FREE):
        drafter = make_drafter(llama, config, costs=measured_here(costs))
        drafted.append(generate(llama, [1, 2, 3], drafter=drafter, max_new_tokens=60, eos_token_ids=[]).stats.drafted)
    assert 0 < drafted[0] <= 6  # two rounds before each pause
    assert drafted[1] >= 20


def test_a_seed_gives_the_same_text_with_a_new_drafter(llama):
    config = DraftConfig(SkipSet(LAYERS, attention=(1,)), stopping=FixedLength(3))
    texts = [
        generate(
            llama,
            [1, 2, 3],
            drafter=make_drafter(llama, config, costs=measured_here(COSTS)),
            sampling=Sampling(1.0, seed=4),
            max_new_tokens=20,
        ).tokens
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_a_copy_has_a_controller_of_its_own(llama):
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1))
    one = make_drafter(llama, config, costs=measured_here(EXPENSIVE))
    assert isinstance(one, ControlledDrafter)
    generate(llama, [1, 2], drafter=one, max_new_tokens=40, eos_token_ids=[])
    other = copy.copy(one)
    assert generate(llama, [1, 2], drafter=other, max_new_tokens=4, eos_token_ids=[]).stats.drafted


def test_costs_are_on_the_line_through_two_texts():
    costs = DraftRoundCosts(
        "cpu", "float32", "eager", (100, 200), ((0, 0), (1, 2)), ((0, 0), (1, 1)), (1, 4, 8), ((2, 2), (3, 4), (6, 5))
    )
    assert costs.plain_steps(100, places=1, tokens=2) == (1 + 3) / 2
    assert costs.plain_steps(300, places=1, tokens=4) == (3 + 5) / 2
    assert costs.plain_steps(300, places=1, tokens=4, resuming=True) == (3 - 1 + 5) / 2
    assert costs.plain_steps(50, places=0, tokens=1) == 1
    assert costs.plain_steps(900, places=9, tokens=8) == (9 + 5) / 2  # longer drafts count as the longest, noise stays
    assert costs.plain_steps(100, places=0, tokens=99) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (2, 4)}, "costs: expected contexts that ascend, and widths that ascend from 1"),
        ({"contexts": (2, 1)}, "costs: expected contexts that ascend, and widths that ascend from 1"),
        ({"widths": (1,)}, "costs: expected as many pairs of seconds for verification as widths, and for drafting as "),
        ({"saved": ()}, "costs: expected as many pairs of seconds for verification as widths, and for drafting as "),
        ({"drafting": ((0, -1),)}, "costs: expected numbers from 0 on, and plain steps that take some time"),
    ],
)
def test_costs_that_cannot_be_are_refused(change, message):
    fields = {"device": "cpu", "dtype": "float32", "engine": "eager", "contexts": (1, 2), "drafting": ((0, 0),)}
    fields |= {"saved": ((0, 0),), "widths": (1, 4), "verification": ((1, 1), (2, 2))}
    with pytest.raises(InvalidInputError) as error:
        DraftRoundCosts(**fields | change)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("change", [{"device": "another"}, {"dtype": "bfloat16"}, {"engine": "packed"}])
def test_costs_that_were_measured_elsewhere_pause_nothing(llama, change):
    config = DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1), prompt_lookup=PromptLookup(1, 3))
    drafter = make_drafter(llama, config, costs=replace(measured_here(EXPENSIVE), **change))
    stats = generate(llama, [1, 2, 3], drafter=drafter, max_new_tokens=60, eos_token_ids=[]).stats
    assert stats.drafted > 30


def test_the_longest_pause_is_shorter_at_the_start_of_a_text():
    controller = Controller()
    proposals(controller, 8, 2000, lambda number: False)
    assert controller._pause > 64
    controller.start()
    assert controller._pause == 64
