"""The limit that a device's memory sets to plain decoding."""

from layerskip import SkipSet
from search.bandwidth import bytes_read, measure_memory_limit
from search.machine_lock import MachineLock
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


def test_the_limit_is_measured_with_the_machine_for_itself(llama, tmp_path):
    limit = measure_memory_limit(llama, MachineLock(tmp_path, llama.device))
    assert limit.step_bytes == bytes_read(llama, llama.target_stack)
    assert limit.tokens_per_second == limit.bandwidth / limit.step_bytes > 0


def test_a_quantized_models_limit_is_not_known(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(llama.hf_model, "hf_quantizer", object(), raising=False)
    assert measure_memory_limit(llama, MachineLock(tmp_path, llama.device)) is None
