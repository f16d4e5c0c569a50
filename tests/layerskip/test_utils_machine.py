"""Names of devices."""

import pytest
import torch

from layerskip.utils import device_name


@pytest.mark.parametrize(("threads", "ending"), [(1, "1 thread"), (2, "2 threads")])
def test_a_processor_is_named_with_its_threads(monkeypatch, threads, ending):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")).endswith(f", {ending}")
