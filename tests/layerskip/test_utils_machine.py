"""What a measurement was made on, in words."""

import pytest
import torch

from layerskip.utils import device_name


@pytest.mark.parametrize(("threads", "said"), [(1, "1 thread"), (2, "2 threads")])
def test_a_processor_is_named_with_its_threads(monkeypatch, threads, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")).endswith(f", {said}")
