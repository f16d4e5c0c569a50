"""The bytes that a pass reads, and how fast they can be read."""

from itertools import chain

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


def test_the_bandwidth_is_that_of_the_fastest_repeat_but_the_first(monkeypatch):
    took = [0.25, 4.0, 2.0, 0.5, 1.0, 8.0]
    clock = chain.from_iterable((0.0, seconds) for seconds in took)
    monkeypatch.setattr("layerskip.engine.bandwidth.device_seconds", lambda device: next(clock))
    assert measure_read_bandwidth(torch.device("cpu"), 2**22) == 2**22 / 0.5
    assert next(clock, None) is None
