"""The limit that a device's memory sets to plain decoding."""

from layerskip.engine.bandwidth import bytes_read
from search.machine_lock import MachineLock
from search.memory_limit import measure_memory_limit


def test_the_limit_is_measured_with_the_machine_for_itself(llama, tmp_path):
    limit = measure_memory_limit(llama, MachineLock(tmp_path, llama.device))
    assert limit.step_bytes == bytes_read(llama, llama.target_stack)
    assert limit.tokens_per_second == limit.bandwidth / limit.step_bytes > 0


def test_a_quantized_models_limit_is_not_known(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(llama.hf_model, "hf_quantizer", object(), raising=False)
    assert measure_memory_limit(llama, MachineLock(tmp_path, llama.device)) is None
