"""Learning what each part of a draft does to the acceptance rate."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip import SkipSet
from layerskip.drafting.config import DraftConfig, DraftLayerRef
from studies.acceptance_model import LEAST_CANDIDATES, AcceptanceModel, acceptance_of, damage_of, learned_acceptance
from tests.strategies import masks

LAYERS, SUBLAYERS = 3, 6
SIZES = (0, 8, 16)
REFS = (DraftLayerRef(2, SUBLAYERS, "layer", 0, "a"), DraftLayerRef(5, SUBLAYERS, "bridge", 0, "b"))


@st.composite
def configs(draw):
    """Any candidate; those that would keep nothing below their draft layer go without."""
    mask = draw(masks(LAYERS))
    layer = draw(st.sampled_from([None, *(ref for ref in REFS if not all(mask[: ref.start]))]))
    return DraftConfig(SkipSet.from_mask(mask), draw(st.booleans()), layer, draw(st.sampled_from(SIZES)))


@given(st.floats(0.01, 1))
def test_damage_and_acceptance_are_inverse(acceptance):
    assert float(acceptance_of(damage_of(acceptance))) == pytest.approx(acceptance)


def test_no_damage_is_full_acceptance_and_no_rate_is_infinite_damage():
    assert damage_of(1.0) == 0
    assert np.isfinite(damage_of(0.0))


@given(st.dictionaries(configs(), st.floats(0, 1), max_size=20))
def test_whatever_was_tried_damages_can_be_drawn(seen):
    model = AcceptanceModel(seen, SUBLAYERS, SIZES, draft_layers=REFS)
    damage = model.sample(np.random.default_rng(0))
    for bridges in (False, True):
        each = damage.of_sublayers(bridges)
        assert each.shape == (SUBLAYERS,)
        assert np.isfinite(each).all()
        assert (each >= 0).all()
        for size in SIZES:
            for layer in (None, *REFS):
                assert 0 <= damage.of_options(DraftConfig(SkipSet(LAYERS), bridges, layer, size)) < np.inf
    mean, low, high = model.intervals()
    assert np.isfinite(mean).all()
    assert (low <= mean).all()
    assert (mean <= high).all()


def test_with_many_trials_the_drawn_damages_are_the_true_ones():
    true, repaired, shrunk = np.array([0.01, 0.4, 0.1, 0.02, 0.2, 0.05]), 0.03, 0.15
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(400):
        mask = rng.random(SUBLAYERS) < 0.5
        skip_set = SkipSet.from_mask((mask & ~mask.all()).tolist())
        config = DraftConfig(skip_set, bool(rng.random() < 0.5), vocabulary_size=int(rng.choice([0, 8])))
        total = np.array(skip_set.mask) @ true - repaired * config.bridges * len(skip_set)
        total += shrunk * bool(config.vocabulary_size)
        if total >= 0:
            seen[config] = float(acceptance_of(total))
    damage = AcceptanceModel(seen, SUBLAYERS, (0, 8)).sample(np.random.default_rng(1))
    assert damage.of_sublayers(False) == pytest.approx(true, abs=0.03)
    assert damage.of_sublayers(True) == pytest.approx(np.maximum(true - repaired, 0), abs=0.03)
    assert damage.of_options(DraftConfig(SkipSet(LAYERS), vocabulary_size=8)) == pytest.approx(shrunk, abs=0.03)
    assert damage.of_options(DraftConfig(SkipSet(LAYERS))) == 0


def test_what_a_draft_layer_does_is_learned_apart_from_the_sublayers_that_it_replaces():
    first, second = DraftLayerRef(2, SUBLAYERS, "layer", 0, "a"), DraftLayerRef(4, SUBLAYERS, "layer", 0, "b")
    true, trained = np.array([0.1, 0.4, 0.1, 0.3, 0.2, 0.05]), {first: 0.9, second: 0.3}
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(300):
        mask = rng.random(SUBLAYERS) < 0.4
        layer = [None, first, second][rng.integers(3)]
        mask &= ~mask[: layer.start if layer else SUBLAYERS].all()
        config = DraftConfig(SkipSet.from_mask(mask.tolist()), draft_layer=layer)
        total = np.array(config.skipped_below.mask) @ true + trained.get(layer, 0.0)
        seen[config] = float(acceptance_of(total))
    damage = AcceptanceModel(seen, SUBLAYERS, draft_layers=(first, second)).sample(np.random.default_rng(1))
    assert damage.of_sublayers(False) == pytest.approx(true, abs=0.05)
    learned = [damage.of_options(DraftConfig(SkipSet(LAYERS), draft_layer=layer)) for layer in (None, first, second)]
    assert learned == pytest.approx([0, 0.9, 0.3], abs=0.05)


DAMAGES = [1.5, 1.0, *[0.05] * 10]  # of each sublayer, in −ln α


def looks(damages, count, *, share=0.3, never=()):
    """Acceptance rates of random candidates of a model to whose sublayers damages add up."""
    source = random.Random(0)
    rates = {}
    while len(rates) < count:
        mask = [*(i not in never and source.random() < share for i in range(len(damages) - 1)), False]
        rate = math.exp(-sum(damage for damage, skip in zip(damages, mask, strict=True) if skip))
        rates[DraftConfig(SkipSet.from_mask(mask))] = rate
    return rates


def test_a_needed_sublayer_is_found_out_from_candidates_that_skip_many():
    learned = learned_acceptance(looks(DAMAGES, 80))
    assert set(learned) == set(range(11))  # the last is always kept
    for i in (0, 1):
        assert learned[i].value < 0.6
        assert learned[i].high < min(learned[other].low for other in range(2, 11))
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in learned.values())


def test_sublayers_that_do_the_same_are_learned_to_do_the_same():
    learned = learned_acceptance(looks([0.05] * 8, 80))
    assert all(one.value == pytest.approx(math.exp(-0.05), abs=0.02) for one in learned.values())


def test_nothing_is_learned_from_few_candidates_or_of_sublayers_that_were_never_skipped():
    assert learned_acceptance(looks(DAMAGES, LEAST_CANDIDATES - 1)) == {}
    assert set(learned_acceptance(looks(DAMAGES, LEAST_CANDIDATES, never=(2, 3)))) <= {0, 1, *range(4, 11)}


def test_nothing_is_learned_of_sublayers_from_drafts_with_a_draft_layer():
    layer = DraftLayerRef(9, 12, "layer", 0, "a")
    seen = looks(DAMAGES, 20)
    trained = {DraftConfig(config.skip_set, draft_layer=layer): 0.0 for config in looks(DAMAGES, 20, share=0.2)}
    assert learned_acceptance(seen | trained) == learned_acceptance(seen)
