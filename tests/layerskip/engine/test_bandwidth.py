"""The bytes that a pass reads, and how fast they can be read."""

import torch

from layerskip import SkipSet
from layerskip.engine.bandwidth import bytes_read, measure_read_bandwidth
from tests.models import LAYERS


def test_a_pass_reads_the_weights_of_its_steps_and_of_its_head(llama):
    layers = sum(
        weight.numel()
        for layer in llama.hf_model.model.layers
        for part in (layer.self_attn, layer.mlp)
        for weight in part.parameters()
    )
    head = llama.hf_model.lm_head.weight.numel()
    assert bytes_read(llama, llama.target_stack) == 4 * (layers + head)
    rest = range(1, LAYERS)
    first_layer = llama.stack_of(SkipSet(LAYERS, attention=rest, mlp=rest))
    assert bytes_read(llama, first_layer) == 4 * (layers // LAYERS + head)


def test_the_bandwidth_is_that_of_reading_memory():
    assert measure_read_bandwidth(torch.device("cpu"), 2**22) > 1e8
