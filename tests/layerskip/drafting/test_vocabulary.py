"""A draft vocabulary holds what the target model would say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.bridges import record_states
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.vocabulary import draft_vocabulary, emission_frequencies
from layerskip.drafting.weights import DraftWeights
from tests.models import LAYERS, VOCABULARY, tiny_llama


def test_frequencies_add_up_to_the_positions(tiny):
    states = record_states(tiny, [[1, 2, 3], [4, 5]])[-1]
    frequencies = emission_frequencies(tiny, states)
    assert frequencies.shape == (VOCABULARY,)
    assert float(frequencies.sum()) == pytest.approx(5, rel=1e-4)
    torch.testing.assert_close(frequencies, tiny.logits(states[None]).softmax(-1).sum(0))


@given(st.lists(st.floats(0, 100), min_size=8, max_size=8), st.sets(st.integers(0, 7), max_size=3), st.integers(3, 8))
def test_a_vocabulary_is_as_large_as_asked_ascending_and_holds_the_special_tokens(frequencies, special, size):
    ids = draft_vocabulary(torch.tensor(frequencies), special, size).tolist()
    assert len(ids) == size
    assert ids == sorted(set(ids))
    assert special <= set(ids)


def test_frequent_tokens_go_first_and_low_ids_where_nothing_is_known():
    frequencies = torch.zeros(100)
    frequencies[90] = 50.0
    assert draft_vocabulary(frequencies, [], 3).tolist() == [0, 1, 90]


def test_a_token_outside_the_draft_vocabulary_is_never_drafted_and_still_generated(tiny):
    ids = torch.arange(VOCABULARY // 2)
    drafted = []

    class Watched(LayerSkipDrafter):
        def propose(self, *arguments):
            draft = super().propose(*arguments)
            drafted.extend(draft.tokens.tolist())
            return draft

    generated = []
    for first in range(8):
        drafter = Watched(
            tiny, DraftConfig(SkipSet(LAYERS, (2,)), stopping=FixedLength(3)), DraftWeights(token_ids=ids)
        )
        generated += generate(tiny, [first, 3], drafter=drafter, max_new_tokens=16).tokens
    assert set(drafted) <= set(ids.tolist())
    assert any(token not in set(ids.tolist()) for token in generated)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_draft_vocabulary_is_brought_to_the_models_device(device):
    model = LayerSkipModel(tiny_llama().to(device))
    weights = DraftWeights(token_ids=torch.tensor([1, 2]))
    placed = weights.placed_on(model)
    assert (placed.token_ids.device, placed.token_ids.dtype) == (model.device, torch.long)
    assert (placed is weights) == (device == "cpu")
