"""Which drafted tokens stand, on distributions written down by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip.sampling import greedy_match, sample, speculative_sampling
from layerskip.token_tree import TokenTree


def one_hot(tokens, size=5):
    return torch.nn.functional.one_hot(torch.tensor(tokens, dtype=torch.long), size).float()


def in_a_chain(drafted, draft, target, generator):
    return speculative_sampling(TokenTree.chain(len(drafted)), drafted, draft, target, generator)


def accepted_prefix(drafted, choices):
    """How many proposals agree with the target model before the first that does not."""
    return next((i for i, token in enumerate(drafted) if token != choices[i]), len(drafted))


small_tokens = st.integers(0, 4)


@given(st.data(), st.lists(small_tokens, max_size=6))
def test_greedy_proposals_stand_up_to_the_first_that_differs_and_the_model_s_own_token_follows(data, drafted):
    choices = [data.draw(st.sampled_from([token, (token + 1) % 5])) for token in drafted] + [data.draw(small_tokens)]
    verdict = greedy_match(TokenTree.chain(len(drafted)), torch.tensor(drafted, dtype=torch.long), one_hot(choices))
    stands = accepted_prefix(drafted, choices)
    assert verdict.accepted == stands
    assert verdict.tokens == choices[: stands + 1]
    assert verdict.tokens[:stands] == drafted[:stands]
    assert verdict.newest.tolist() == verdict.tokens[-1:]


@given(st.lists(small_tokens, max_size=6), small_tokens, st.integers(0, 99))
def test_a_draft_from_the_model_s_own_distribution_always_stands_whole(drafted, last, seed):
    target = torch.cat([torch.full((len(drafted), 5), 0.2), one_hot([last])])
    verdict = in_a_chain(torch.tensor(drafted, dtype=torch.long), target[:-1], target, seeded(seed))
    assert verdict.tokens == [*drafted, last]
    assert verdict.newest.tolist() == [last]


@given(st.integers(0, 3), st.integers(0, 99))
def test_a_token_that_the_model_rules_out_never_stands_nor_does_anything_behind_it(impossible, seed):
    """The draft is sure of token 0; before one position the model is sure of token 4."""
    drafted = torch.zeros(4, dtype=torch.long)
    choices = [0, 0, 0, 0, 2]
    choices[impossible] = 4
    verdict = in_a_chain(drafted, one_hot([0] * 4), one_hot(choices), seeded(seed))
    assert verdict.tokens == [0] * impossible + [4]
    assert verdict.newest.tolist() == [4]


def test_a_token_stands_as_often_as_the_model_finds_it_likely_and_the_residual_replaces_it():
    """The draft always says 0, the model gives it 0.3: it stands in 30 % of rounds, else 1 or 2 comes, 0.5 to 0.2."""
    draft, target = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.3, 0.5, 0.2], [0, 0, 1.0]])
    generator, rounds = seeded(0), 4000
    first = [in_a_chain(torch.tensor([0]), draft, target, generator).tokens[0] for _ in range(rounds)]
    for token, expected in enumerate([0.3, 0.5, 0.2]):
        assert abs(first.count(token) / rounds - expected) < 0.03


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_rejection_by_rounding_alone_is_answered_by_the_model_s_own_distribution():
    """In float32 p can come out below q for one token and above it for none, so that nothing is left of p - q."""
    q = torch.tensor([[0.5, 0.5]])
    p = torch.tensor([[0.5 - 2**-20, 0.5], [1.0, 0.0]])
    verdicts = [in_a_chain(torch.tensor([0]), q * 2**30, p, seeded(seed)) for seed in range(20)]
    assert {tuple(verdict.tokens) for verdict in verdicts} == {(0, 0), (1,)}


def test_an_index_is_drawn_as_often_as_its_probability_says_and_never_one_without():
    weights, generator, draws = torch.tensor([0.0, 3.0, 0.0, 6.0, 1.0]), seeded(0), 4000
    drawn = [int(sample(weights, generator)) for _ in range(draws)]
    for index, weight in enumerate(weights.tolist()):
        assert abs(drawn.count(index) / draws - weight / 10) < 0.03
    assert set(drawn) == {1, 3, 4}
