"""Compiled sublayers give the same text, and are compiled once whatever the number of layers and skip sets."""

import shutil

import pytest
import torch

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import EagerEngine, GraphEngine, compile_sublayers
from tests.capture import call_directly
from tests.models import EVERY_FAMILY, FAMILIES, near_tie_or_same, transformers_greedy

PROMPT = [1, 2, 3]
LENGTH = 30


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False):
        yield
    torch._dynamo.reset()


class CountingBackend:
    """Runs what was traced as it is, and counts what it is given to compile."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


def decode(model, skip_set, engine=None):
    drafter = LayerSkipDrafter(model, DraftConfig(skip_set, stopping=FixedLength(3)))
    return generate(model, PROMPT, engine=engine, drafter=drafter, max_new_tokens=LENGTH, eos_token_ids=[]).tokens


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])  # Gemma-2 is compiled and captured below
def test_compilations_do_not_grow_with_skip_sets_or_layers_and_the_text_is_the_same(family):
    backend, graphs = CountingBackend(), []
    for layers in (4, 10):
        hf_model = EVERY_FAMILY[family](num_hidden_layers=layers)
        expected = transformers_greedy(hf_model, PROMPT, LENGTH)
        model = LayerSkipModel(hf_model)
        compile_sublayers(model, backend)
        for skip_set in (SkipSet(layers, (2,), (1,)), SkipSet(layers, (0, 3)), SkipSet(layers, mlp=(0, 2))):
            near_tie_or_same(hf_model, PROMPT, decode(model, skip_set), expected)
            graphs.append(backend.graphs)
        assert transformers_greedy(hf_model, PROMPT, LENGTH) == expected
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * len(graphs)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_s_text_is_that_of_transformers():
    hf_model = FAMILIES["llama-sdpa"]()
    model = LayerSkipModel(hf_model)
    compile_sublayers(model)
    ours = decode(model, SkipSet(4, (2,), (1,)))
    near_tie_or_same(hf_model, PROMPT, ours, transformers_greedy(hf_model, PROMPT, LENGTH))


@pytest.mark.slow
def test_compiled_sublayers_can_be_captured():
    hf_model = FAMILIES["gemma2"]()
    model = LayerSkipModel(hf_model)
    compile_sublayers(model, "eager")
    ours = decode(model, SkipSet(4, (2,), (1,)), GraphEngine(model, call_directly))
    near_tie_or_same(hf_model, PROMPT, ours, transformers_greedy(hf_model, PROMPT, LENGTH))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-sdpa", "gemma2"])
def test_captured_passes_are_compiled_whole_and_once_whatever_the_number_of_layers(family):
    """In fixed shapes: no break at the cache, and a compilation for each kind of sublayer, width and bucket."""
    backend, graphs = CountingBackend(), []
    for layers in (4, 12):
        settings = {"num_hidden_layers": layers}
        if family == "gemma2":
            settings["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        hf_model = (FAMILIES[family] if family in FAMILIES else EVERY_FAMILY[family])(**settings)
        expected = transformers_greedy(hf_model, PROMPT, LENGTH)
        model = LayerSkipModel(hf_model)
        compile_sublayers(model, backend)
        torch._dynamo.utils.counters.clear()
        for skip_set in (SkipSet(layers, (2,), (1,)), SkipSet(layers, (0, 3))):
            ours = decode(model, skip_set, GraphEngine(model, call_directly))
            near_tie_or_same(hf_model, PROMPT, ours, expected)
        assert not torch._dynamo.utils.counters["graph_break"]
        graphs.append(backend.graphs)
    assert graphs[1] <= 2 * graphs[0]  # the second model's modules are others; its layers are not


def test_a_compiled_model_is_warmed_up_like_a_captured_one():
    model = LayerSkipModel(FAMILIES["llama-sdpa"]())
    assert not EagerEngine(model).captures
    compile_sublayers(model, "eager")
    assert EagerEngine(model).captures
