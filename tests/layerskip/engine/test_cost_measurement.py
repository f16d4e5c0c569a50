"""What passes cost is measured interleaved, by parts, and an engine's own costs are kept."""

import json

import pytest
import torch

from layerskip import LayerSkipModel, SkipSet
from layerskip.costs import DraftParts
from layerskip.engine import (
    EagerEngine,
    GraphEngine,
    PassCosts,
    load_costs,
    make_engine,
    measure_costs,
    measure_passes,
)
from layerskip.engine.cost_measurement import _filled_cache, _step_costs, comparable_seconds
from layerskip.names import PRECISIONS
from tests.capture import call_directly
from tests.models import LAYERS, VOCABULARY, tiny_llama


def test_costs_are_the_seconds_of_sublayers_and_head_at_each_width(monkeypatch):
    engine, elapsed = EagerEngine(LayerSkipModel(tiny_llama())), [0.0]
    verify, logits = engine.verify, engine.passes.logits

    def slow_verify(tokens, *rest):
        elapsed[0] += 10 + len(tokens)
        return verify(tokens, *rest)

    def slow_logits(*given):
        elapsed[0] += 3
        return logits(*given)

    monkeypatch.setattr(engine, "verify", slow_verify)
    monkeypatch.setattr(engine.passes, "logits", slow_logits)
    monkeypatch.setattr("layerskip.engine.cost_measurement.device_seconds", lambda device: elapsed[0])
    costs = measure_passes(engine, widths=(1, 2, 5))
    assert costs.sublayers == {1: 11, 2: 12, 5: 15}
    assert costs.head == {1: 3, 2: 3, 5: 3}


def test_passes_are_measured_as_the_engine_runs_them_at_exact_widths(monkeypatch):
    model = LayerSkipModel(tiny_llama())
    engine = GraphEngine(model, call_directly)
    engine.costs = kept = PassCosts({1: 9.0, 4: 1.0}, {1: 1.0, 4: 1.0})
    assert set(measure_passes(engine, widths=(1, 3)).sublayers) == {1, 3}
    assert {width for width, _ in engine._verifications} == {1, 3}
    assert engine.costs is kept


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
    assert load_costs(EagerEngine(llama), tmp_path / "new").cost(1) == 5.0


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
    assert load_costs(EagerEngine(llama), tmp_path).cost(1) > 0
    assert json.loads(file.read_text())["sublayers"]


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(llama, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert load_costs(EagerEngine(llama), tmp_path / "file").cost(1) > 0
    assert "cannot keep what passes cost" in caplog.text


def test_an_engine_that_is_made_has_costs_and_one_of_its_own_has_none(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    assert EagerEngine(llama).costs is None
    assert make_engine(llama).costs == load_costs(EagerEngine(llama), tmp_path)


def test_a_model_with_a_short_context_can_be_measured():
    model = LayerSkipModel(tiny_llama(max_position_embeddings=4))
    assert measure_passes(EagerEngine(model)).cost(1) > 0


def test_ratios_of_runs_do_not_depend_on_when_the_machine_was_slow():
    """Two runs of 1 and 2 seconds and 4 seconds; slow rounds take three times as long, and one run was interrupted."""
    fast, slow = [1.0, 2.0, 4.0], [3.0, 6.0, 12.0]
    assert comparable_seconds([slow, fast, slow, fast]) == pytest.approx(fast)
    assert comparable_seconds([fast, fast, [1.0, 90.0, 4.0], fast, fast]) == pytest.approx(fast)
    # The fastest of each would say that the first two take as long as each other.
    uneven = [slow, slow, [3.0, 2.0, 12.0], slow, slow, slow]
    one, two, four = comparable_seconds(uneven)
    assert (two / one, four / one) == pytest.approx((2.0, 4.0))


def test_the_parts_of_a_step_add_up_to_the_whole_that_was_measured():
    """Where skipping half of the sublayers saved more than half, each part would be taken for too much."""
    seconds = {"whole": 10.0, "head": 1.0, "half of attention": 7.0, "half of mlp": 6.0, "bridged": 6.5}
    step = _step_costs(2, [0], seconds)
    assert 2 * (step.attention + step.mlp) + step.fixed + step.head[0] == pytest.approx(10.0)
    assert step.mlp / step.attention == pytest.approx(4 / 3)
    step = _step_costs(2, [0], seconds | {"half of attention": 9.0, "half of mlp": 8.0})
    assert (step.attention, step.mlp, step.fixed) == (1.0, 2.0, 3.0)


# The parts of draft steps.

SIZES = (0, VOCABULARY // 2)


@pytest.fixture(scope="module")
def measured(llama):
    return measure_costs(EagerEngine(llama), vocabularies=SIZES, most_drafted=3, precisions=("int8", "int4"))


def test_everything_that_a_search_can_ask_for_was_measured_and_costs_something(llama, measured):
    for context in (1, 30, 64, 5000):
        costs = measured.at(context)
        for skip_set in (
            SkipSet(LAYERS),
            SkipSet(LAYERS, attention=(1,), mlp=(1, 2)),
            SkipSet(LAYERS, mlp=range(LAYERS)),
        ):
            for precision in PRECISIONS:
                assert costs.draft_step(DraftParts.of(llama.stack_of(skip_set, precision=precision))) > 0
                assert costs.draft_step(DraftParts(1, 1, 2, VOCABULARY // 2, precision)) > 0
        assert costs.prefill > 0
        assert all(costs.verification(tokens, 0.5) > 0 for tokens in range(1, 5))


def test_lengths_are_those_that_the_model_has_room_for(measured):
    assert (measured.short.context, measured.long.context) == (
        60,
        60,
    )  # 64 positions, and the widest verification of four
    assert measured.at(1).step == measured.at(999).step


class LengthsEngine(EagerEngine):
    """Keeps the length of the text before each pass after it."""

    def __init__(self, model):
        super().__init__(model)
        self.lengths = []

    def draft_step(self, tokens, cache, stack):
        self.lengths.append(cache.length)
        return super().draft_step(tokens, cache, stack)

    def verify(self, tokens, cache, shared=None, tree=None):
        self.lengths.append(cache.length)
        return super().verify(tokens, cache, shared, tree)


def test_all_passes_are_measured_after_a_short_and_a_long_text_in_turn():
    engine = LengthsEngine(LayerSkipModel(tiny_llama(max_position_embeddings=4096)))
    costs = measure_costs(engine, most_drafted=1)
    assert (costs.short.context, costs.long.context) == (64, 1900)
    half = len(engine.lengths) // 24  # of a round: after one of the two texts
    assert engine.lengths == ([64] * half + [1900] * half) * 12


def test_a_long_text_is_filled_in_without_running_it():
    engine = EagerEngine(LayerSkipModel(tiny_llama(max_position_embeddings=4096)))
    cache = _filled_cache(engine, 1900, [4])
    assert cache.length == 1900
    for part in cache.written():
        assert part.shape[2] == 1900
        assert torch.equal(part[:, :, 64:], part[:, :, :1].expand_as(part[:, :, 64:]))


def test_on_captured_passes_a_short_text_reads_a_small_bucket():
    engine = GraphEngine(LayerSkipModel(tiny_llama(max_position_embeddings=4096)), call_directly)
    measure_costs(engine, most_drafted=1)
    assert {bucket for _, bucket in engine._verifications} == {256, 2048}


def test_the_widths_that_the_engine_would_choose_are_measured(llama, measured):
    assert set(measured.short.passes.sublayers) == {1, 2, 3, 4}
    assert measured.precisions == PRECISIONS
    engine = EagerEngine(LayerSkipModel(tiny_llama()))
    choice = engine.costs = PassCosts({1: 1.0, 2: 9.0, 12: 5.0}, dict.fromkeys((1, 2, 12), 0.0))
    costs = measure_costs(engine, most_drafted=3)
    assert set(costs.short.passes.sublayers) == {1, 12}
    assert costs.precisions == ("full",)
    assert engine.costs is choice
    assert all(costs.at(9).verification(tokens, 0.5) > 0 for tokens in range(1, 5))
