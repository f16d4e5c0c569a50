"""Profiles of trained stand-ins for tiny models, and a model for which a perfect one is known."""

from datetime import UTC, datetime

import torch

from layerskip import DraftConfig, DraftProfile, FixedLength, LayerSkipModel, SkipSet
from layerskip.drafting.bridges import Bridge
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.weights import DraftWeights
from layerskip.fingerprint import identify
from layerskip.profile import Provenance
from tests.models import random_layers, tiny_llama

# Layers of the model below that do something that depends on the text.
BUSY = 2


def profile_with(model, weights, *, skip_set=None, start=4, training_seconds=60.0):
    """A profile as tuning makes one, of an early exit at a sublayer if nothing else is said."""
    if skip_set is None:
        skip_set = SkipSet.from_mask([index >= start for index in range(len(model.sublayers))])
    return DraftProfile.of(
        DraftConfig(skip_set, stopping=FixedLength(3)),
        weights,
        model=identify(model, "a model"),
        provenance=Provenance(
            created=datetime(2026, 1, 2, tzinfo=UTC), tool="a test", training_seconds=training_seconds
        ),
    )


def layer_profile(model, *, start=4, vocabulary=None, seed=0):
    """Of a random decoder layer, in half precision as tuning saves it."""
    layers = random_layers(model, {start: len(model.sublayers)}, seed=seed)
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    half = DraftWeights(token_ids=ids, layers=layers).to(torch.bfloat16)
    return profile_with(model, half, start=start)


def bridge_profile(model, *, start=4, shift=0.1):
    """Of a bridge that adds a little to each number."""
    size = model.config.hidden_size
    bridge = Bridge(start, len(model.sublayers), (torch.zeros(size, size),), torch.full((size,), shift))
    return profile_with(model, DraftWeights(bridges=[bridge]), start=start)


@torch.no_grad()
def shifting_model(num_layers=4):
    """A model whose layers above the lowest two together add the same to every hidden state, a part in each MLP.

    So a draft without any of these MLPs is never right, and a single layer that adds it all is always right.
    """
    hf_model = tiny_llama(num_hidden_layers=num_layers, mlp_bias=True)
    source = torch.Generator().manual_seed(1)
    for layer in hf_model.model.layers[BUSY:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        layer.mlp.down_proj.bias.normal_(0, 5, generator=source)
    return LayerSkipModel(hf_model)


def _whole_shift(model):
    return sum(layer.mlp.down_proj.bias.detach() for layer in model.hf_model.model.layers[BUSY:])


def perfect_layer(model):
    """The profile of a decoder layer that adds what all upper layers of a shifting model do."""
    start, top = 2 * BUSY, len(model.sublayers)
    layer = DraftLayer.copied(model, start, top, model.num_layers - 1)
    layer.layer.mlp.down_proj.bias.copy_(_whole_shift(model))
    return profile_with(model, DraftWeights(layers=[layer]))


def perfect_bridge(model):
    """Likewise, of a bridge."""
    start, size = 2 * BUSY, model.config.hidden_size
    bridge = Bridge(start, len(model.sublayers), (torch.zeros(size, size),), _whole_shift(model))
    return profile_with(model, DraftWeights(bridges=[bridge]))
