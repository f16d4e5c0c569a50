"""What is not a number is never a token."""

import pytest
import torch

from layerskip import DraftConfig, FixedLength, LayerSkipModel, Sampling, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.errors import NotANumberError
from layerskip.sampling import speculative_sampling
from layerskip.token_tree import TokenTree
from tests.models import LAYERS, tiny_llama


def broken_model(value):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = value
    return LayerSkipModel(model)


@pytest.mark.parametrize(
    "sampling", [None, Sampling(1.0, seed=0), Sampling(0.5, top_k=5, seed=0), Sampling(1.0, top_p=0.9)]
)
@pytest.mark.parametrize("drafting", [False, True])
def test_scores_that_are_not_numbers_are_an_error_and_no_token(sampling, drafting):
    model = broken_model(float("nan"))
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (1,)), stopping=FixedLength(2))) if drafting else None
    with pytest.raises(NotANumberError, match="not numbers"):
        generate(model, [1, 2, 3], drafter=drafter, sampling=sampling, max_new_tokens=4)


def test_scores_that_stop_being_numbers_are_an_error_when_they_are_reached():
    model = LayerSkipModel(tiny_llama())
    first, second, *_ = generate(model, [1, 2, 3], max_new_tokens=2, eos_token_ids=()).tokens
    with torch.no_grad():
        model.hf_model.model.embed_tokens.weight[second] = float("nan")
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS), stopping=FixedLength(1)))
    seen = []
    with pytest.raises(NotANumberError):
        generate(model, [1, 2, 3], drafter=drafter, max_new_tokens=8, eos_token_ids=(), on_token=seen.append)
    assert seen == [first, second][: len(seen)]


@pytest.mark.parametrize("temperature", [1e-39, 1e-45, 5e-31])
def test_a_temperature_of_next_to_nothing_is_greedy(llama, temperature):
    greedy = generate(llama, [1, 2, 3], max_new_tokens=8, eos_token_ids=()).tokens
    assert (
        generate(llama, [1, 2, 3], sampling=Sampling(temperature), max_new_tokens=8, eos_token_ids=()).tokens == greedy
    )


def test_a_draft_that_is_not_a_number_changes_no_distribution():
    """The drafted token counts as certain, so it is accepted with the probability that the target model gives it."""
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    draft, drafted = torch.full((1, 3), float("nan")), torch.tensor([0])
    counts = torch.zeros(3, 3)
    rounds = 20_000
    for _ in range(rounds):
        tokens = speculative_sampling(TokenTree.chain(1), drafted, draft, target, generator).tokens
        counts[tokens[0], tokens[1] if len(tokens) > 1 else 0] += 1
    first = counts.sum(1) / rounds
    assert torch.allclose(first, target[0], atol=0.015)
    assert torch.allclose(counts[0] / counts[0].sum(), target[1], atol=0.03)


def test_siblings_of_a_draft_that_is_not_a_number_change_no_distribution():
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([[0.1, 0.5, 0.4], [1.0, 0, 0], [0, 1.0, 0]])
    tree = TokenTree.comb([2])
    draft, drafted = torch.full((1, 3), float("nan")), torch.tensor([0, 2])
    rounds = 20_000
    firsts = [speculative_sampling(tree, drafted, draft, target, generator).tokens[0] for _ in range(rounds)]
    shares = torch.bincount(torch.tensor(firsts), minlength=3) / rounds
    assert torch.allclose(shares, target[0], atol=0.015)
