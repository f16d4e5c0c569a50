"""The engine that suits a machine is found by a measurement, which is kept."""

import json

import pytest

from layerskip import LayerSkipModel
from layerskip.engine import EagerEngine, PackedEngine, compile_sublayers, make_engine
from layerskip.engine.kernel_measurement import packing_pays
from layerskip.packed_linear import PackedLinear, packing_available
from tests.models import tiny_llama

needs_packing = pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    return tmp_path


def decide(folder, model, *, packed):
    """Write down a measurement in which packed weights take so many seconds, and plain ones take one."""
    packing_pays(model)
    [file] = folder.glob("kernels-*.json")
    file.write_text(json.dumps({"plain": 1.0, "packed": packed}))


@needs_packing
@pytest.mark.parametrize(("packed", "expected"), [(0.5, PackedEngine), (2.0, EagerEngine)])
def test_auto_is_packed_where_that_was_measured_to_be_faster(own_cache, packed, expected):
    model = LayerSkipModel(tiny_llama())
    decide(own_cache, model, packed=packed)
    engine = make_engine(model, "auto", in_place=True)
    assert type(engine) is expected
    assert engine.costs is not None
    replaced = any(isinstance(module, PackedLinear) for module in model.hf_model.modules())
    assert replaced == (expected is PackedEngine)


@needs_packing
def test_a_measurement_is_of_both_and_is_made_once(own_cache):
    model = LayerSkipModel(tiny_llama())
    packing_pays(model)
    [file] = own_cache.iterdir()
    seconds = json.loads(file.read_text())
    assert set(seconds) == {"plain", "packed"}
    assert min(seconds.values()) > 0
    decide(own_cache, model, packed=0.5)
    assert packing_pays(LayerSkipModel(tiny_llama(seed=1)))


@needs_packing
def test_a_damaged_measurement_is_made_anew(own_cache):
    model = LayerSkipModel(tiny_llama())
    packing_pays(model)
    [file] = own_cache.iterdir()
    file.write_text("{}")
    packing_pays(model)
    assert set(json.loads(file.read_text())) == {"plain", "packed"}


def test_auto_is_eager_where_a_model_cannot_be_packed():
    assert type(make_engine(LayerSkipModel(tiny_llama().half()), "auto")) is EagerEngine
    model = LayerSkipModel(tiny_llama())
    compile_sublayers(model, "eager")
    assert type(make_engine(model, "auto")) is EagerEngine
