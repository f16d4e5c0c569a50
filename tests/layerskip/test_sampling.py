"""Sampling settings, and the distribution that they leave: the one that transformers samples from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, Sampling, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.errors import InvalidInputError
from layerskip.sampling import Draft, Draw, GreedySampler
from tests.models import LAYERS, VOCABULARY
from tests.strategies import draft_exits, skip_sets, tokens

CPU = torch.device("cpu")


def transformers_distribution(hf_model, prompt, sampling):
    out = hf_model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
    )
    return out.scores[0][0].softmax(-1)


@given(
    tokens(8),
    st.floats(0.2, 5),
    st.integers(0, VOCABULARY + 5),
    st.floats(0.05, 1),
)
@settings(max_examples=60)
def test_the_distribution_is_that_of_model_generate(tiny, prompt, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p, seed=0)
    with torch.inference_mode():
        logits = tiny.logits(tiny.forward(torch.tensor(prompt), tiny.new_cache(8)))[-1]
        ours = sampling.sampler(CPU).draw(logits).distribution
    torch.testing.assert_close(ours, transformers_distribution(tiny.hf_model, prompt, sampling), atol=1e-4, rtol=0)


@given(st.integers(1, 6), st.integers(0, 999))
def test_a_draw_comes_from_the_tokens_that_top_k_leaves(top_k, seed):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    draw = Sampling(2.0, top_k=top_k, seed=seed).sampler(CPU).draw(logits)
    assert int(draw.tokens) in logits.topk(top_k).indices
    assert int((draw.distribution > 0).sum()) == top_k


def test_the_default_is_greedy():
    assert isinstance(Sampling().sampler(CPU), GreedySampler)
    assert isinstance(Sampling(temperature=0, top_k=5, seed=1).sampler(CPU), GreedySampler)


def test_a_draft_of_no_draws_is_empty():
    assert len(Draft.of([], CPU)) == 0
    assert len(Draft.of([Draw(torch.tensor([3]), None)] * 2, CPU)) == 2


@given(tokens(8), skip_sets(), draft_exits(), st.integers(0, 99), st.booleans())
@settings(max_examples=25)
def test_the_same_seed_gives_the_same_output(tiny, prompt, skip_set, draft_exit, seed, drafting):
    def once():
        drafter = LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=draft_exit)) if drafting else None
        return generate(tiny, prompt, drafter=drafter, sampling=Sampling(1.5, seed=seed), max_new_tokens=8).tokens

    assert once() == once()


def test_without_a_seed_outputs_vary(llama):
    drafter = LayerSkipDrafter(llama, DraftConfig(SkipSet(LAYERS, (1,)), stopping=FixedLength(4)))
    outputs = {
        tuple(generate(llama, [1], drafter=drafter, sampling=Sampling(3.0), max_new_tokens=12).tokens) for _ in range(5)
    }
    assert len(outputs) > 1


def test_different_seeds_give_different_outputs(llama):
    outputs = {
        tuple(generate(llama, [1], sampling=Sampling(3.0, seed=seed), max_new_tokens=12).tokens) for seed in range(5)
    }
    assert len(outputs) > 1


def test_a_temperature_near_zero_is_as_good_as_greedy(llama):
    cold = generate(llama, [5, 6], sampling=Sampling(1e-4, seed=0), max_new_tokens=12)
    assert cold.tokens == generate(llama, [5, 6], max_new_tokens=12).tokens


@pytest.mark.parametrize("temperature", [1, 2])
def test_a_whole_number_is_a_temperature_too(temperature):
    """Command lines and JSON give 1 where 1.0 is meant."""
    logits = torch.tensor([0.0, 1.0, 2.0])
    whole, fraction = (Sampling(t, seed=0).sampler(CPU).draw(logits) for t in (temperature, float(temperature)))
    assert torch.equal(whole.distribution, fraction.distribution)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number from 0 on, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a number from 0 on, got nan"),
        ({"temperature": float("inf")}, "temperature: expected a number from 0 on, got inf"),
        ({"top_k": -1}, "top_k: expected a whole number from 0 on, got -1"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p: expected a number above 0 and at most 1, got 1.1"),
        ({"top_p": float("nan")}, "top_p: expected a number above 0 and at most 1, got nan"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(values, message):
    with pytest.raises(InvalidInputError) as error:
        Sampling(**values)
    assert str(error.value) == message
