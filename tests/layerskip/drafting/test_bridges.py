"""A bridge is the affine map that a run of skipped sublayers is closest to."""

import pytest
import torch
from hypothesis import given, settings

import layerskip.drafting.bridges as bridges_module
from layerskip import ConfidenceThreshold, DraftConfig, SkipSet, generate
from layerskip.drafting.bridges import Bridge, BridgeFitter, fit_bridges, record_states
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from tests.models import LAYERS, VOCABULARY, near_tie_or_same, transformers_greedy
from tests.strategies import skip_sets, tokens

MIDDLE = SkipSet(LAYERS, attention=(1, 2), mlp=(1, 2))


def texts(count=40, length=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (count, length), generator=generator).tolist()


@pytest.fixture(scope="module")
def states(tiny):
    return record_states(tiny, texts())


@pytest.fixture(scope="module")
def states_of_family(each_family):
    return record_states(each_family, texts(10))


def test_the_states_recorded_are_those_at_the_boundaries(each_family):
    text = texts(1)
    states = record_states(each_family, text)
    with torch.inference_mode():
        logits = each_family.logits(states[-1][None])
        torch.testing.assert_close(logits, each_family.hf_model(torch.tensor(text)).logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states[0], each_family.embed(torch.tensor(text[0]))[0])
    assert states.shape == (2 * LAYERS + 1, len(text[0]), each_family.config.hidden_size)


def test_no_more_positions_are_kept_than_asked_for(tiny):
    assert record_states(tiny, texts(), positions=100).shape[1] <= 100


def test_an_affine_run_is_found_again(tiny):
    """States that a known affine map made: the fit gives that map."""
    generator = torch.Generator().manual_seed(1)
    size = tiny.config.hidden_size
    weight, bias = torch.randn(size, size, generator=generator) / size, torch.randn(size, generator=generator)
    before = torch.randn(4000, size, generator=generator)
    states = torch.stack([before] * (2 * LAYERS + 1))
    states[6] = before + before @ weight.T + bias
    bridge = BridgeFitter(tiny, states, ridge=1e-6)._fit_run(2, 6)
    torch.testing.assert_close(bridge.factor[0], weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bridge.bias, bias, atol=1e-3, rtol=1e-3)


def test_a_bridge_comes_closer_to_what_it_replaces_than_nothing_does(tiny, states, monkeypatch):
    monkeypatch.setattr(bridges_module, "_WORTH", float("inf"))
    [bridge] = BridgeFitter(tiny, states).fit(MIDDLE)
    fresh = record_states(tiny, [[5, 3, 2, 9, 11, 4, 8, 30, 1, 7]])
    before, after = fresh[bridge.start][None], fresh[bridge.stop][None]
    assert (bridge(before, None) - after).norm() < (before - after).norm()


def test_an_outlier_position_is_left_out_of_the_fit(tiny, monkeypatch):
    usual = record_states(tiny, texts(4)).shape[1]
    original = tiny.embed

    def sink(tokens):
        x = original(tokens).clone()
        x[0, 0] *= 1000
        return x

    monkeypatch.setattr(tiny, "embed", sink)
    assert record_states(tiny, texts(4)).shape[1] == usual - 4


def test_only_runs_that_weigh_much_more_than_a_bridge_get_one(tiny, states, monkeypatch):
    weights = sum(tiny.sublayers[i].num_weights for i in range(2, 6))
    size = tiny.config.hidden_size
    for worth, expected in [(size**2 / weights * 1.01, {2}), (size**2 / weights * 0.99, set())]:
        monkeypatch.setattr(bridges_module, "_WORTH", worth)
        assert {bridge.start for bridge in BridgeFitter(tiny, states).fit(MIDDLE)} == expected


def test_a_wide_model_gets_bridges_of_low_rank(tiny, states, monkeypatch):
    monkeypatch.setattr(bridges_module, "_WORTH", float("inf"))
    full = BridgeFitter(tiny, states).fit(MIDDLE)[0]
    monkeypatch.setattr(bridges_module, "_LOW_RANK_FROM", 1)
    low = BridgeFitter(tiny, states).fit(MIDDLE)[0]
    size = tiny.config.hidden_size
    assert [tuple(factor.shape) for factor in low.factor] == [(size // 8, size), (size, size // 8)]
    x = states[2][None]
    held_in = torch.arange(x.shape[1]) % 4 != 3
    change, wanted = (low(x, None) - x)[0, held_in], (states[6] - states[2])[held_in]
    torch.testing.assert_close(change.mean(0), wanted.mean(0), atol=1e-4, rtol=1e-3)  # right on average
    assert (low(x, None) - full(x, None)).norm() < (x - full(x, None)).norm()


@pytest.mark.parametrize("positions", [20, 200])
def test_a_bridge_is_the_ridge_regression_whichever_matrix_is_smaller(tiny, positions):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(positions, 32, generator=generator)
    after = before + 0.1 * torch.randn(positions, 32, generator=generator)
    ridge = 0.3
    fitted = BridgeFitter(tiny, torch.stack([before, after]), ridge=ridge)._fit_run(0, 1)
    held_in = torch.arange(positions) % 4 != 3
    x, y = before[held_in], (after - before)[held_in]
    x, y = x - x.mean(0), y - y.mean(0)
    gram = x.T @ x
    expected = torch.linalg.solve(gram + ridge * gram.trace() / 32 * torch.eye(32), x.T @ y)
    torch.testing.assert_close(fitted.factor[0], expected.T, atol=1e-4, rtol=1e-3)


def test_what_is_kept_of_bridges_has_a_bound(tiny, states, monkeypatch):
    monkeypatch.setattr(bridges_module, "_WORTH", float("inf"))
    monkeypatch.setattr(bridges_module, "_BYTES_KEPT", 3 * 32 * 33 * 4)
    fitter = BridgeFitter(tiny, states)
    boundaries = range(2 * tiny.num_layers)
    for start in boundaries:
        fitter._bridge(start, start + 1)
    assert 1 <= len(fitter._fitted._values) <= 3
    again = fitter._bridge(boundaries[-1], boundaries[-1] + 1)
    assert again is fitter._bridge(boundaries[-1], boundaries[-1] + 1)


@given(tokens(12), skip_sets())
@settings(max_examples=4)
def test_greedy_output_does_not_change_with_bridges_and_a_draft_vocabulary(
    each_family, states_of_family, prompt, skip_set
):
    fitter = BridgeFitter(each_family, states_of_family)
    fitter.is_cheaper = lambda start, stop: True
    drafter = LayerSkipDrafter(
        each_family,
        DraftConfig(skip_set, stopping=ConfidenceThreshold(0.1, 4), target_confidence_threshold=0.05),
        DraftWeights(bridges=fitter.fit(skip_set), token_ids=torch.arange(0, VOCABULARY, 2)),
    )
    ours = generate(each_family, prompt, drafter=drafter, max_new_tokens=16, eos_token_ids=[])
    expected = transformers_greedy(each_family.hf_model, prompt, 16, set())
    near_tie_or_same(each_family.hf_model, prompt, ours.tokens, expected)


def test_one_call_fits_the_bridges_of_a_skip_set(tiny, monkeypatch):
    monkeypatch.setattr(bridges_module, "_WORTH", float("inf"))
    bridges = fit_bridges(tiny, texts(), MIDDLE)
    assert [(bridge.start, bridge.stop) for bridge in bridges] == [(2, 6)]
    assert isinstance(bridges[0], Bridge)


@pytest.mark.parametrize("nothing", [[], [[1, 2, 3], []]])
def test_bridges_cannot_be_fitted_to_no_text(tiny, nothing):
    with pytest.raises(InvalidInputError, match=r"^texts: expected at least one, .* none of them empty$"):
        fit_bridges(tiny, nothing, MIDDLE)
