"""The engine that suits a machine is found by a measurement, which is kept."""

import json

import pytest

from layerskip import LayerSkipModel
from layerskip.engine import EagerEngine, PackedEngine, compile_sublayers, make_engine
from layerskip.engine.kernel_measurement import load_kernel_seconds
from layerskip.packed_linear import PackedLinear, packing_available
from tests.models import tiny_llama

needs_packing = pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    return tmp_path


def decide(folder, model, *, one_row, four_rows):
    """Write down a measurement in which packed weights take so many seconds, and plain ones one second each."""
    load_kernel_seconds(model)
    [file] = folder.glob("kernels-*.json")
    file.write_text(json.dumps({"plain": {1: 1.0, 4: 1.0}, "packed": {1: one_row, 4: four_rows}}))


@needs_packing
@pytest.mark.parametrize(
    ("one_row", "four_rows", "expected", "replaced"),
    [(0.5, 0.5, PackedEngine, True), (1.2, 0.5, PackedEngine, False), (1.2, 1.0, EagerEngine, False)],
)
def test_auto_is_packed_where_that_was_measured_to_be_faster(own_cache, one_row, four_rows, expected, replaced):
    """The plain weights stay where they are faster for one row."""
    model = LayerSkipModel(tiny_llama())
    decide(own_cache, model, one_row=one_row, four_rows=four_rows)
    engine = make_engine(model, "auto", in_place=True)
    assert type(engine) is expected
    assert engine.costs is not None
    assert any(isinstance(module, PackedLinear) for module in model.hf_model.modules()) == replaced


@needs_packing
def test_a_measurement_is_of_both_and_is_made_once(own_cache):
    model = LayerSkipModel(tiny_llama())
    load_kernel_seconds(model)
    [file] = own_cache.iterdir()
    seconds = json.loads(file.read_text())
    assert set(seconds) == {"plain", "packed"}
    assert all(min(by_rows.values()) > 0 for by_rows in seconds.values())
    decide(own_cache, model, one_row=0.5, four_rows=0.25)
    kept = load_kernel_seconds(LayerSkipModel(tiny_llama(seed=1)))
    assert kept.packed == {1: 0.5, 4: 0.25}
    assert kept.packing_pays
    assert not kept.one_row_is_faster_plain


@needs_packing
def test_a_damaged_measurement_is_made_anew(own_cache):
    model = LayerSkipModel(tiny_llama())
    load_kernel_seconds(model)
    [file] = own_cache.iterdir()
    file.write_text("{}")
    load_kernel_seconds(model)
    assert set(json.loads(file.read_text())) == {"plain", "packed"}


def test_auto_is_eager_where_a_model_cannot_be_packed():
    assert type(make_engine(LayerSkipModel(tiny_llama().half()), "auto")) is EagerEngine
    model = LayerSkipModel(tiny_llama())
    compile_sublayers(model, "eager")
    assert type(make_engine(model, "auto")) is EagerEngine
