"""Texts that tiny models wrote, for all tests of training."""

import pytest
import torch

from layerskip import LayerSkipModel
from layerskip.training import DataSettings, GivenPrompts, TrainingTextWriter
from tests.models import tiny_gemma2, tiny_llama

EXIT = 1
SETTINGS = DataSettings(EXIT, max_new_tokens=12, batch_size=16)


def random_prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (count,), generator=generator).tolist()
    return GivenPrompts([torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths])


@pytest.fixture(scope="session", params=[tiny_llama, tiny_gemma2], ids=["llama", "gemma2"])
def writer(request):
    return LayerSkipModel(request.param())


@pytest.fixture(scope="session")
def shards(writer, tmp_path_factory):
    """About 1,500 positions of either family."""
    folder = tmp_path_factory.mktemp("training")
    return TrainingTextWriter(writer, random_prompts(160), SETTINGS, folder, "fingerprint").collect(1500)
