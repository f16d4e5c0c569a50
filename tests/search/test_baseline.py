"""transformers' plain decoding is timed beside ours, where the model still has its plain weights."""

from dataclasses import replace

import pytest

from layerskip import LayerSkipModel
from layerskip.engine import EagerEngine, PackedEngine
from layerskip.packed_linear import packing_available
from search.baseline import TransformersBaseline, has_plain_weights, measure_transformers
from search.machine_lock import MachineLock
from search.measure import timed
from search.prompts import EncodedPrompt
from studies.comparison import TRANSFORMERS_PLAIN
from tests.models import tiny_llama

PROMPTS = [EncodedPrompt(str(number), (number, 2, 3)) for number in range(1, 4)]


def test_both_decode_a_few_prompts_in_one_run(llama, tmp_path, monkeypatch):
    def taking(model, method, *rest):
        return replace(timed(model, method, *rest), seconds=0.5 if method.name == TRANSFORMERS_PLAIN else 0.25)

    monkeypatch.setattr("search.measure.timed", taking)
    baseline = measure_transformers(EagerEngine(llama), PROMPTS, 6, MachineLock(tmp_path, llama.device))
    assert baseline == TransformersBaseline(tokens_per_second=12, of_ours=0.5, prompts=2)


@pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")
def test_packed_weights_say_nothing_of_transformers(tmp_path):
    model = LayerSkipModel(tiny_llama())
    lock = MachineLock(tmp_path, model.device)
    assert measure_transformers(PackedEngine(model), PROMPTS, 4, lock) is not None
    assert has_plain_weights(model)
    assert measure_transformers(PackedEngine(model, in_place=True), PROMPTS, 4, lock) is None
    assert not has_plain_weights(model)


def test_a_model_that_transformers_cannot_decode_has_no_baseline(tmp_path, monkeypatch):
    model = LayerSkipModel(tiny_llama())

    def refuse(*_, **__):
        raise ValueError("not this model")

    monkeypatch.setattr(type(model.hf_model), "generate", refuse)
    assert measure_transformers(EagerEngine(model), PROMPTS, 4, MachineLock(tmp_path, model.device)) is None


def test_the_baseline_says_what_a_speedup_is_worth_against_it():
    assert TransformersBaseline(26.4, 0.8, 2).describe(1.5) == (
        "26.4 tokens/s in transformers' plain decoding of 2 of the prompts: the draft is 1.88× as fast"
    )
