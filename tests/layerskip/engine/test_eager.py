"""However verification runs – padded, or behind what drafting already computed – it gives the target model's logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import EagerEngine, PassCosts, SharedPrefix
from tests.models import near_tie_or_same, transformers_greedy
from tests.strategies import draft_exits, precisions, skip_sets, tokens

WIDTHS = (1, 2, 3, 4, 6, 9, 12)
# Passes cost the less the wider they are, so that every verification is padded and none resumes.
WIDE_IS_CHEAP = PassCosts({width: 20.0 - width for width in WIDTHS}, dict.fromkeys(WIDTHS, 1.0))
# Every token costs, so that none is padded and all resume.
TOKENS_COST = PassCosts({width: float(width) for width in WIDTHS}, dict.fromkeys(WIDTHS, 1.0))
# Six tokens are cheapest, so that verification is padded and resumes as well.
A_DIP = PassCosts(
    {width: 2.0 if width == 6 else 1.0 + width for width in WIDTHS} | {1: 1.0}, dict.fromkeys(WIDTHS, 1.0)
)
COSTS = {"exact": None, "padded": WIDE_IS_CHEAP, "resumed": TOKENS_COST, "both": A_DIP}


@pytest.fixture(params=COSTS, scope="module")
def costs(request, tiny):
    return COSTS[request.param]


def engine_with(model, costs):
    engine = EagerEngine(model)
    engine.costs = costs
    return engine


@given(
    tokens(20), st.builds(DraftConfig, skip_sets(), precision=precisions(), stopping=draft_exits()), st.integers(1, 24)
)
@settings(max_examples=25)
def test_greedy_output_is_that_of_transformers_whatever_passes_cost(tiny, costs, prompt, config, length):
    ours = generate(
        tiny,
        prompt,
        engine=engine_with(tiny, costs),
        drafter=LayerSkipDrafter(tiny, config),
        max_new_tokens=length,
        eos_token_ids=[],
    )
    near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, length, set()))


@given(tokens(8), tokens(6, min_size=2), skip_sets())
@settings(max_examples=25)
def test_a_verification_gives_the_logits_of_a_plain_pass(tiny, costs, text, drafted, skip_set):
    engine, stack = engine_with(tiny, costs), tiny.stack_of(skip_set)
    with torch.inference_mode():
        cache = engine.new_cache(len(text))
        engine.prefill(torch.tensor(text), cache)
        plain = tiny.logits(tiny.forward(torch.tensor(drafted), cache))
        cache.rollback(len(text))
        steps = [engine.draft_step(torch.tensor([token]), cache, stack) for token in drafted[:-1]]
        cache.rollback(len(text))
        shared = None
        if stack.shared:
            shared = SharedPrefix(torch.cat([step.prefix for step in steps], dim=1), stack.shared)
        verified = engine.verify(torch.tensor(drafted), cache, shared).logits
    assert cache.length == len(text) + len(drafted)
    torch.testing.assert_close(verified, plain, atol=1e-4, rtol=1e-4)


def test_a_pass_is_as_wide_as_is_cheapest(tiny, monkeypatch):
    widths = []
    original = tiny.pass_context
    monkeypatch.setattr(tiny, "pass_context", lambda width, cache: widths.append(width) or original(width, cache))
    engine = engine_with(tiny, A_DIP)
    cache = engine.new_cache(40)
    with torch.inference_mode():
        engine.prefill(torch.tensor([1, 2]), cache)
        for needed in (1, 2, 5, 6, 7, 20):
            engine.verify(torch.arange(needed), cache, None)
    assert widths == [2, 1, 6, 6, 6, 9, 20]


def test_resuming_leaves_out_the_shared_sublayers_of_all_tokens_but_one(tiny):
    """Counted by the calls of the first MLP, which draft and target model share."""
    rows = []
    handle = tiny.hf_model.model.layers[0].mlp.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[1]))
    engine = engine_with(tiny, TOKENS_COST)
    try:
        skip_set = SkipSet(tiny.num_layers, mlp=(tiny.num_layers - 1,))
        drafter = LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=FixedLength(3)))
        generate(tiny, [1, 2, 3], engine=engine, drafter=drafter, max_new_tokens=4)
    finally:
        handle.remove()
    assert rows[0] == 3  # the prompt
    assert set(rows[1:]) == {1}  # draft steps, and the last drafted token


@given(st.integers(1, 20))
def test_the_cheapest_width_is_wide_enough(needed):
    for costs in (WIDE_IS_CHEAP, TOKENS_COST, A_DIP):
        width = costs.cheapest_width(needed)
        assert width >= needed
        wide_enough = [w for w in WIDTHS if w >= needed]
        assert width == needed if not wide_enough else costs.cost(width) == min(map(costs.cost, wide_enough))


def test_a_prompt_gives_the_states_of_all_its_tokens_and_scores_behind_the_last(tiny):
    text = torch.tensor([3, 1, 4, 1, 5, 9])
    with torch.inference_mode():
        expected = tiny.forward(text, tiny.new_cache(6))
        engine = EagerEngine(tiny)
        cache = engine.new_cache(6)
        first, rest = engine.prefill(text[:2], cache), engine.prefill(text[2:], cache)
        torch.testing.assert_close(torch.cat([first.states, rest.states]), expected[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rest.logits, tiny.logits(expected[:, -1:]), atol=1e-4, rtol=1e-4)
