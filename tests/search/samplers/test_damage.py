"""Learning what leaving out each sublayer does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.samplers import Draft, DraftChoices
from search.samplers.damage import DamageModel, acceptance_of, log_rejection
from tests.search.samplers.problems import ALL_KINDS, bits

masks = st.lists(st.booleans(), min_size=6, max_size=6).map(tuple)


@given(st.floats(0.01, 1))
def test_damage_and_acceptance_are_inverse(acceptance):
    assert float(acceptance_of(np.array(log_rejection(acceptance)))) == pytest.approx(acceptance)


def test_no_damage_is_full_acceptance_and_no_rate_is_infinite_damage():
    assert log_rejection(1.0) == 0
    assert np.isfinite(log_rejection(0.0))


@pytest.mark.parametrize("choices", ALL_KINDS)
@given(data=st.data())
def test_whatever_was_tried_damages_can_be_drawn(choices, data):
    drafts = st.builds(lambda mask, extras: Draft(mask, *extras), masks, st.sampled_from(list(choices.extras)))
    seen = data.draw(st.lists(st.tuples(drafts, st.floats(0, 1)), max_size=20))
    model = DamageModel(choices, [draft for draft, _ in seen], [rate for _, rate in seen])
    damage = model.sample(np.random.default_rng(0))
    for bridged, vocabulary, stand_in in choices.extras:
        each = damage.of_sublayers(bridged)
        assert each.shape == (6,)
        assert np.isfinite(each).all()
        assert (each >= 0).all()
        assert 0 <= damage.of_extras(bridged, vocabulary, stand_in) < np.inf


def test_with_many_trials_the_drawn_damages_are_the_true_ones():
    choices = DraftChoices(bits(6), bridges=True, vocabularies=(0, 8))
    true, mended, shrunk = np.array([0.01, 0.4, 0.1, 0.02, 0.2, 0.05]), 0.03, 0.15
    rng = np.random.default_rng(0)
    drafts = [
        Draft(tuple((rng.random(6) < 0.5).tolist()), bool(rng.random() < 0.5), int(rng.choice([0, 8])))
        for _ in range(400)
    ]
    totals = np.array(
        [
            np.array(draft.mask) @ true - mended * draft.bridged * sum(draft.mask) + shrunk * bool(draft.vocabulary)
            for draft in drafts
        ]
    )
    keep = totals >= 0
    kept = [draft for draft, good in zip(drafts, keep, strict=True) if good]
    model = DamageModel(choices, kept, acceptance_of(totals[keep]).tolist())
    damage = model.sample(np.random.default_rng(1))
    assert damage.of_sublayers(False) == pytest.approx(true, abs=0.03)
    assert damage.of_sublayers(True) == pytest.approx(np.maximum(true - mended, 0), abs=0.03)
    assert damage.of_extras(False, 8) == pytest.approx(shrunk, abs=0.03)
    assert damage.of_extras(False, 0) == 0


def test_what_a_stand_in_does_is_learned_apart_from_the_sublayers_that_it_stands_for():
    choices = DraftChoices(bits(6), exits=(2, 4))
    true, trained = np.array([0.1, 0.4, 0.1, 0.3, 0.2, 0.05]), {1: 0.9, 2: 0.3}
    rng = np.random.default_rng(0)
    drafts = [
        choices.effective(Draft(tuple((rng.random(6) < 0.4).tolist()), stand_in=int(rng.integers(3))))
        for _ in range(300)
    ]
    totals = [
        np.array(draft.mask[: choices.free(draft.stand_in)]) @ true[: choices.free(draft.stand_in)]
        + trained.get(draft.stand_in, 0.0)
        for draft in drafts
    ]
    damage = DamageModel(choices, drafts, acceptance_of(np.array(totals)).tolist()).sample(np.random.default_rng(1))
    assert damage.of_sublayers(False) == pytest.approx(true, abs=0.03)
    assert [damage.of_extras(False, 0, number) for number in (0, 1, 2)] == pytest.approx([0, 0.9, 0.3], abs=0.03)
