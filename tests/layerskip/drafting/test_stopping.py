"""When a draft stops: the policies, and the adaptive threshold's published rule with numbers worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip import AdaptiveThreshold, ConfidenceThreshold, DraftConfig, FixedLength, SkipSet
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import EagerEngine
from layerskip.errors import InvalidInputError
from layerskip.sampling import GreedySampler
from tests.models import LAYERS
from tests.strategies import draft_exits, fractions


@given(fractions)
def test_a_fixed_length_never_stops_early_and_never_reads_confidence(confidence):
    state = FixedLength(3).new_state()
    state.observe(drafted=3, accepted=0)
    assert not state.stops_after(confidence)
    assert not state.reads_confidence
    assert state.max_length == 3


@given(st.floats(0.01, 1), fractions)
def test_a_confidence_threshold_stops_below_it_and_not_at_it(threshold, confidence):
    state = ConfidenceThreshold(threshold, max_length=5).new_state()
    assert state.stops_after(confidence) == (confidence < threshold)
    assert not state.stops_after(threshold)
    assert state.reads_confidence


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=5))
def test_a_confidence_threshold_learns_nothing(rounds):
    state = ConfidenceThreshold(0.4, max_length=5).new_state()
    for drafted, accepted in rounds:
        state.observe(drafted, min(accepted, drafted))
    assert state.threshold == 0.4


def test_a_threshold_of_zero_needs_no_confidence():
    assert not ConfidenceThreshold(0.0).new_state().reads_confidence


def test_the_adaptive_threshold_follows_the_published_rule():
    """Draft & Verify, section 3.3, with the authors' constants: target 0.9, step 0.01, momenta 0.5 and 0.9."""
    state = AdaptiveThreshold().new_state()
    assert state.threshold == 0.8
    history = [
        # drafted, accepted, threshold after the round
        (8, 8, 0.801),  # rate 0.5 * 0 + 0.5 * 1 = 0.5, below 0.9: 0.9 * 0.8 + 0.1 * 0.81
        (4, 4, 0.802),  # rate 0.75, below
        (2, 2, 0.803),  # rate 0.875, below
        (8, 8, 0.803),  # rate 0.9375, above, but the draft ran to its full length: stays
        (3, 3, 0.802),  # rate 0.96875, above: 0.9 * 0.803 + 0.1 * 0.793
        (4, 3, 0.803),  # rate 0.5 * 0.96875 + 0.5 * 0.75 = 0.859375, below
        (1, 0, 0.804),  # rate 0.4296875, below
    ]
    for drafted, accepted, threshold in history:
        state.observe(drafted, accepted)
        assert state.threshold == pytest.approx(threshold, abs=1e-12)


def test_the_adaptive_threshold_uses_its_own_constants():
    policy = AdaptiveThreshold(
        initial_threshold=0.5, max_length=4, target_rate=0.5, step=0.2, rate_momentum=0.25, threshold_momentum=0.75
    )
    state = policy.new_state()
    state.observe(drafted=2, accepted=1)  # rate 0.75 * 0.5 = 0.375, below 0.5: 0.75 * 0.5 + 0.25 * 0.7
    assert state.threshold == pytest.approx(0.55)
    state.observe(drafted=2, accepted=2)  # rate 0.25 * 0.375 + 0.75 = 0.84375: 0.75 * 0.55 + 0.25 * 0.35
    assert state.threshold == pytest.approx(0.5)
    assert state.max_length == 4


def test_the_adaptive_threshold_stops_at_what_it_has_learned():
    state = AdaptiveThreshold(initial_threshold=0.8, step=1.0, threshold_momentum=0.5).new_state()
    assert not state.stops_after(0.9)
    state.observe(drafted=1, accepted=0)  # 0.5 * 0.8 + 0.5 * 1.8
    assert state.stops_after(0.9)
    assert state.reads_confidence


@given(draft_exits())
def test_each_generation_starts_with_a_fresh_state(draft_exit):
    used, fresh = draft_exit.new_state(), draft_exit.new_state()
    used.observe(drafted=1, accepted=0)
    assert draft_exit.new_state().threshold == fresh.threshold


def test_the_defaults_are_as_documented():
    assert FixedLength() == FixedLength(length=4)
    assert ConfidenceThreshold() == ConfidenceThreshold(threshold=0.6, max_length=8)
    assert AdaptiveThreshold() == AdaptiveThreshold(
        initial_threshold=0.8, max_length=8, target_rate=0.9, step=0.01, rate_momentum=0.5, threshold_momentum=0.9
    )


@pytest.mark.parametrize(
    ("draft_exit", "text"),
    [
        (FixedLength(5), "5 tokens"),
        (ConfidenceThreshold(0.25, 6), "confidence below 0.25, at most 6 tokens"),
        (AdaptiveThreshold(0.7, 6), "adaptive confidence from 0.7, at most 6 tokens"),
    ],
)
def test_a_draft_exit_prints_what_it_does(draft_exit, text):
    assert str(draft_exit) == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedLength(0), "length: expected at least 1, got 0"),
        (lambda: ConfidenceThreshold(max_length=0), "max_length: expected at least 1, got 0"),
        (lambda: ConfidenceThreshold(1.5), "threshold: expected a number from 0 to 1, got 1.5"),
        (lambda: ConfidenceThreshold(-0.1), "threshold: expected a number from 0 to 1, got -0.1"),
        (lambda: ConfidenceThreshold(float("nan")), "threshold: expected a number from 0 to 1, got nan"),
        (lambda: AdaptiveThreshold(max_length=-1), "max_length: expected at least 1, got -1"),
        *(
            (lambda name=name: AdaptiveThreshold(**{name: 2}), f"{name}: expected a number from 0 to 1, got 2")
            for name in ("initial_threshold", "target_rate", "step", "rate_momentum", "threshold_momentum")
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make, message):
    with pytest.raises(InvalidInputError) as error:
        make()
    assert str(error.value) == message


# The drafter obeys the rule.


def drafted(model, draft_exit, limit=20):
    """The tokens and confidences of one greedy draft."""
    with torch.inference_mode():
        cache = model.new_cache(1)
        drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (1,), (2,)), stopping=draft_exit))
        drafter.start(EagerEngine(model), torch.tensor([7]), torch.zeros(1, 1))
        tokens = drafter.propose(torch.tensor([7]), cache, limit, GreedySampler()).tokens.tolist()
        cache.rollback(0)
        x = model.forward(torch.tensor([7, *tokens[:-1]]), cache, SkipSet(LAYERS, (1,), (2,)))
        return tokens, model.logits(x).softmax(-1).max(-1).values.tolist()


@given(st.integers(1, 9), st.integers(0, 9))
def test_a_fixed_draft_has_its_length_unless_fewer_tokens_can_be_used(tiny, length, limit):
    with torch.inference_mode():
        drafter = LayerSkipDrafter(tiny, DraftConfig(SkipSet(LAYERS, (1,)), stopping=FixedLength(length)))
        drafter.start(EagerEngine(tiny), torch.tensor([7]), torch.zeros(1, 1))
        draft = drafter.propose(torch.tensor([7]), tiny.new_cache(1), limit, GreedySampler())
    assert len(draft) == min(length, limit)


@pytest.mark.parametrize("rank", range(5))
def test_a_draft_ends_with_the_first_token_below_the_threshold(tiny, rank):
    everything, confidences = drafted(tiny, FixedLength(8))
    threshold = sorted(confidences)[rank] + 1e-4  # just above one of the confidences that occur
    first_unsure = next(i for i, confidence in enumerate(confidences) if confidence < threshold)
    tokens, _ = drafted(tiny, ConfidenceThreshold(threshold, max_length=8))
    assert tokens == everything[: first_unsure + 1]
