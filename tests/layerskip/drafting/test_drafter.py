"""What every drafter that proposes place by place does."""

from itertools import pairwise

import pytest
import torch

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import GraphEngine
from layerskip.sampling import GreedySampler
from tests.capture import call_directly
from tests.layerskip.engine.test_cuda_graphs import Calls
from tests.models import LAYERS, tiny_llama

SKIPPED = SkipSet(LAYERS, (2,), (1,))


@pytest.mark.parametrize("token_ids", [None, torch.arange(24)])
def test_captured_steps_of_a_chain_have_their_token_in_place_after_the_first(token_ids):
    model = LayerSkipModel(tiny_llama())
    engine = GraphEngine(model, call_directly)
    copies = []
    for length in (1, 1, 2, 3):  # the first captures
        drafter = LayerSkipDrafter(
            model, DraftConfig(SKIPPED, stopping=FixedLength(length)), DraftWeights(token_ids=token_ids)
        )
        with torch.inference_mode():
            cache = engine.new_cache(16)
            prompt = torch.tensor([1, 2])
            drafter.start(engine, prompt, engine.prefill(prompt, cache).states)
            with Calls() as calls:
                drafter.propose(torch.tensor([3]), cache, length, GreedySampler())
        copies.append(calls.names.count("aten.copy_.default"))
    _, first, *longer = copies
    assert [after - before for before, after in pairwise([first, *longer])] == [first - 1, first - 1]
