from types import SimpleNamespace

import pytest
import torch

from layerskip import LayerSkipModel
from layerskip.drafting.bridges import record_states
from tests.models import VOCABULARY, tiny_llama

LAYERS = 6
# Sublayers of the model below whose output is zero: attention 1, MLP 1, attention 3 and MLP 4.
IDLE = (2, 3, 6, 9)


def in_parallel(model):
    """Runs a sublayer on several versions of a whole text at once, each with its own past."""

    def run_sublayer(index, x):
        context = model.pass_context(x.shape[1], model.new_cache(x.shape[1]))
        return model.sublayers[index](x, context)

    return run_sublayer


def with_states(hf_model):
    model = LayerSkipModel(hf_model)
    text = torch.randint(VOCABULARY, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    return SimpleNamespace(model=model, text=text, states=record_states(model, [text]), run_sublayer=in_parallel(model))


@pytest.fixture(scope="session")
def busy():
    """A model whose every sublayer matters, with its hidden states over a text."""
    return with_states(tiny_llama(num_hidden_layers=LAYERS))


@pytest.fixture(scope="session")
def partly_idle():
    """A model of which some sublayers do nothing, with its hidden states over a text."""
    hf_model = tiny_llama(num_hidden_layers=LAYERS)
    with torch.no_grad():
        for index in IDLE:
            layer = hf_model.model.layers[index // 2]
            (layer.mlp.down_proj if index % 2 else layer.self_attn.o_proj).weight.zero_()
    return with_states(hf_model)
