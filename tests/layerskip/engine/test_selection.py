"""The engine that suits a machine is found by a measurement, which is kept."""

import json
import math

import pytest
import torch

from layerskip import LayerSkipModel
from layerskip.engine import EagerEngine, PackedEngine, compile_sublayers, kernel_measurement, make_engine
from layerskip.engine.kernel_measurement import KernelSeconds, load_kernel_seconds
from layerskip.packed_linear import PackedLinear, has_kernels_for, packing_available
from tests.models import tiny_llama

needs_packing = pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")


def linears_of(model):
    return [m for layer in model.hf_model.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_measurement, "_MOST", math.inf)  # whatever else this machine does meanwhile
    return tmp_path


def decide(folder, model, *, one_row, several):
    """Write down a measurement in which packed weights take so many seconds, and plain ones one second each."""
    load_kernel_seconds(model)
    [file] = folder.glob("kernels-*.json")
    file.write_text(json.dumps({"plain": {1: 1.0, 5: 1.0}, "packed": {1: one_row, 5: several}, "weights": 9}))


@needs_packing
@pytest.mark.parametrize(
    ("one_row", "several", "expected", "replaced"),
    [
        (0.5, 0.5, PackedEngine, True),
        (1.2, 0.5, PackedEngine, False),
        (1.6, 0.8, PackedEngine, False),  # slower if it ran all passes
        (1.6, 1.15, PackedEngine, False),  # not faster, but sublayers run in fewer operators
        (1.6, 1.25, EagerEngine, False),
    ],
)
def test_auto_is_packed_where_that_was_measured_to_be_faster(own_cache, one_row, several, expected, replaced):
    """The plain weights stay where they are faster for one row."""
    model = LayerSkipModel(tiny_llama())
    decide(own_cache, model, one_row=one_row, several=several)
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
    assert set(seconds) == {"plain", "packed", "weights"}
    assert all(min(seconds[kind].values()) > 0 for kind in ("plain", "packed"))
    assert seconds["weights"] == sum(linear.weight.numel() for linear in linears_of(model))
    decide(own_cache, model, one_row=0.5, several=0.4)
    kept = load_kernel_seconds(LayerSkipModel(tiny_llama(seed=1)))
    assert kept.packed == {1: 0.5, 5: 0.4}
    assert kept.packing_pays
    assert not kept.one_row_is_faster_plain


@needs_packing
def test_a_damaged_measurement_is_made_anew(own_cache):
    model = LayerSkipModel(tiny_llama())
    load_kernel_seconds(model)
    [file] = own_cache.iterdir()
    file.write_text("{}")
    load_kernel_seconds(model)
    assert set(json.loads(file.read_text())) == {"plain", "packed", "weights"}


@needs_packing
def test_a_measurement_on_a_busy_machine_is_repeated_and_never_kept(own_cache, monkeypatch):
    """One row of a kernel cannot take several times as long as five."""
    busy = KernelSeconds(plain={1: 1.0, 5: 1.0}, packed={1: 7.0, 5: 1.0}, weights=9)
    quiet = KernelSeconds(plain={1: 1.0, 5: 1.5}, packed={1: 1.0, 5: 1.0}, weights=9)
    answers = [busy, busy, quiet, *[busy] * 9]
    monkeypatch.setattr(kernel_measurement, "_MOST", 1.5)
    monkeypatch.setattr(kernel_measurement, "measure_kernels", lambda linears: answers.pop(0))
    model = LayerSkipModel(tiny_llama())
    assert load_kernel_seconds(model) == quiet
    [file] = own_cache.iterdir()
    assert load_kernel_seconds(model) == quiet
    file.unlink()
    assert load_kernel_seconds(model) == busy
    assert not list(own_cache.iterdir())


@needs_packing
def test_what_bfloat16_would_save_is_that_of_all_weights(own_cache, monkeypatch):
    model = LayerSkipModel(tiny_llama())
    taken = {torch.float32: 4e-6, torch.bfloat16: 1e-6}

    def measured(linears):
        seconds = taken[linears[0].weight.dtype]
        return KernelSeconds(plain={1: 2 * seconds, 5: 1.0}, packed={1: seconds, 5: 1.0}, weights=2)

    monkeypatch.setattr(kernel_measurement, "measure_kernels", measured)
    monkeypatch.setattr(kernel_measurement, "has_kernels_for", lambda dtype: True)
    whole = sum(linear.weight.numel() for linear in linears_of(model)) + model.hf_model.lm_head.weight.numel()
    assert kernel_measurement.seconds_saved_by_bfloat16(model) == pytest.approx(1.5e-6 * whole)
    assert all(linear.weight.dtype == torch.float32 for linear in linears_of(model))  # copies were measured
    assert kernel_measurement.seconds_saved_by_bfloat16(LayerSkipModel(tiny_llama().bfloat16())) is None


@needs_packing
def test_nothing_is_measured_in_bfloat16_where_the_processor_has_no_kernels_for_it(own_cache, monkeypatch):
    model = LayerSkipModel(tiny_llama())
    assert (kernel_measurement.seconds_saved_by_bfloat16(model) is not None) == has_kernels_for(torch.bfloat16)
    monkeypatch.setattr(kernel_measurement, "has_kernels_for", lambda dtype: dtype == torch.float32)
    assert kernel_measurement.seconds_saved_by_bfloat16(model) is None


def test_auto_is_eager_where_a_model_cannot_be_packed():
    assert type(make_engine(LayerSkipModel(tiny_llama().half()), "auto")) is EagerEngine
    model = LayerSkipModel(tiny_llama())
    compile_sublayers(model, "eager")
    assert type(make_engine(model, "auto")) is EagerEngine
