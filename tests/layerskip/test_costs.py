"""What passes cost is measured once and kept."""

import json

import pytest

from layerskip import LayerSkipModel
from layerskip.engine import (
    EagerEngine,
    GraphEngine,
    PassCosts,
    cost_measurement,
    load_costs,
    make_engine,
    measure_costs,
)
from tests.capture import call_directly
from tests.models import tiny_llama


def test_costs_are_measured_for_each_width_and_are_times(llama):
    costs = measure_costs(EagerEngine(llama), widths=(1, 2, 5))
    assert set(costs.sublayers) == set(costs.head) == {1, 2, 5}
    assert all(seconds > 0 for part in (costs.sublayers, costs.head) for seconds in part.values())
    assert costs.relative(1) == 1


def test_passes_are_measured_as_the_engine_runs_them_at_exact_widths(monkeypatch):
    model = LayerSkipModel(tiny_llama())
    engine = GraphEngine(model, call_directly)
    engine.costs = kept = PassCosts({1: 9.0, 4: 1.0}, {1: 1.0, 4: 1.0})
    assert set(measure_costs(engine, widths=(1, 3)).sublayers) == {1, 3}
    assert {width for width, _ in engine._verifications} == {1, 3}
    assert engine.costs is kept


def test_a_head_that_seems_to_take_longer_than_the_pass_leaves_something_for_the_sublayers(llama, monkeypatch):
    monkeypatch.setattr(
        cost_measurement, "_measure", lambda engine, widths, context: ({1: 1.0, 2: 4.0}, {1: 2.0, 2: 1.0})
    )
    costs = measure_costs(EagerEngine(llama), widths=(1, 2))
    assert costs.sublayers[1] > 0
    assert costs.seconds(1) == pytest.approx(1.0)
    assert (costs.sublayers[2], costs.head[2]) == (3.0, 1.0)


def test_another_engine_has_costs_of_its_own(tmp_path):
    model = LayerSkipModel(tiny_llama())
    load_costs(EagerEngine(model), tmp_path)
    load_costs(GraphEngine(model, call_directly), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_costs_are_measured_once_and_kept(llama, tmp_path):
    first = load_costs(EagerEngine(llama), tmp_path / "new")
    [file] = (tmp_path / "new").iterdir()
    assert load_costs(EagerEngine(llama), tmp_path / "new") == first
    file.write_text(json.dumps({"sublayers": {"1": 2.0}, "head": {"1": 3.0}}))
    assert load_costs(EagerEngine(llama), tmp_path / "new").seconds(1) == 5.0


def test_another_model_has_costs_of_its_own(llama, gemma2, tmp_path):
    load_costs(EagerEngine(llama), tmp_path)
    load_costs(EagerEngine(gemma2), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_quantized_model_has_costs_of_its_own(llama, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    hf_model = tiny_llama()
    quantization.quantize_(hf_model, quantization.Int8WeightOnlyConfig())
    load_costs(EagerEngine(llama), tmp_path)
    load_costs(EagerEngine(LayerSkipModel(hf_model)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"sublayers": 1, "head": 2}'])
def test_a_damaged_file_is_measured_and_written_anew(llama, tmp_path, content):
    load_costs(EagerEngine(llama), tmp_path)
    [file] = tmp_path.iterdir()
    file.write_text(content)
    assert load_costs(EagerEngine(llama), tmp_path).seconds(1) > 0
    assert json.loads(file.read_text())["sublayers"]


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(llama, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert load_costs(EagerEngine(llama), tmp_path / "file").seconds(1) > 0
    assert "cannot keep what passes cost" in caplog.text


def test_an_engine_that_is_made_has_costs_and_one_of_its_own_has_none(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    assert EagerEngine(llama).costs is None
    assert make_engine(llama).costs == load_costs(EagerEngine(llama), tmp_path)


def test_a_model_with_a_short_context_can_be_measured():
    model = LayerSkipModel(tiny_llama(max_position_embeddings=4))
    assert measure_costs(EagerEngine(model)).seconds(1) > 0
