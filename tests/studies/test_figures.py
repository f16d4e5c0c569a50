"""What each figure shows, as data."""

import itertools

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip.costs import best_speedup
from studies.figures import study_figures
from studies.figures.candidate_figures import family_of
from studies.view import view_study
from tests.studies.synthetic_studies import SOURCES, StudyBuilder


@pytest.fixture(scope="module")
def drawn(searched):
    """The pictures of a full study, by id."""
    return {picture.id: picture for picture in study_figures(searched, 5)}


def traces(picture, name):
    return [trace for trace in picture.figure.data if trace.name == name]


def points(picture, name):
    [trace] = [trace for trace in traces(picture, name) if trace.x[0] is not None]
    return list(zip(trace.x, trace.y, strict=True))


def test_the_skip_map_has_the_masks_of_the_best_candidates_in_their_order(searched, drawn):
    cells = drawn["skip-map"].figure.data[0].z
    assert len(cells) == 3 * 5
    for number, one in enumerate(searched.ranked[:5]):
        name, attention, mlp = cells[3 * number : 3 * number + 3]
        assert set(name) == {None}
        assert tuple(cell == 3 for cell in attention) == one.config.skip_set.skips_attention
        assert tuple(cell == 4 for cell in mlp) == one.config.skip_set.skips_mlp
        kept = {"full": 0, "int8": 1, "int4": 2}[one.config.precision]
        assert {*attention, *mlp} <= {kept, 3, 4}
    labels = [annotation.text for annotation in drawn["skip-map"].figure.layout.annotations]
    assert [label.split(" · ")[:2] for label in labels] == [
        [f"trial {one.number}", f"{one.best_speedup.value:.3f}× {one.best_basis}"] for one in searched.ranked[:5]
    ]


def test_predicted_and_measured_differ_in_shape_wherever_both_are_shown(drawn):
    for picture, names in (
        (drawn["acceptance"], ("predicted", "measured")),
        (drawn["predictions"], ("search's prompts", "held-out prompts")),
        (drawn["prompts"], ("search prompts", "held-out prompts")),
        (drawn["history"], ("tpe", "measured")),
    ):
        one, other = (traces(picture, name)[0].marker.symbol for name in names)
        assert one.removesuffix("-open") != other.removesuffix("-open")


def test_diamonds_and_squares_are_measured_in_the_history_too_and_its_caption_says_which(storage):
    view = view_study(StudyBuilder(storage).predict(12).measure(2).measure(1, stopped=True).storage, "s")
    [picture] = [picture for picture in study_figures(view, 5) if picture.id == "history"]
    shapes = {trace.name: trace.marker.symbol for trace in picture.figure.data if trace.mode == "markers"}
    assert (shapes.pop("measured"), shapes.pop("measured, stopped early")) == ("diamond", "diamond-open")
    assert not {shape.removesuffix("-open") for shape in shapes.values()} & {"diamond", "square"}
    assert "Diamonds are measured, hollow diamonds stopped early, after some prompts" in picture.caption


def test_every_trial_is_in_the_history_once(searched, drawn):
    shown = [x for trace in drawn["history"].figure.data if trace.mode == "markers" for x in trace.x]
    assert sorted(shown) == [one.number for one in searched.trials]


def test_families_of_sources_are_told_apart_by_shape(drawn):
    named = [trace for trace in drawn["history"].figure.data if trace.mode == "markers"]
    assert {family_of(source) for source in SOURCES} < {trace.name for trace in named}
    assert len({trace.marker.symbol for trace in named}) == len(named)


def test_the_best_so_far_never_falls(drawn):
    for name in ("best predicted so far", "best measured so far"):
        [line] = traces(drawn["history"], name)
        assert all(before <= after for before, after in itertools.pairwise(line.y))


def test_predictions_are_compared_with_measurements(searched, drawn):
    whole = [one for one in searched.measured if not one.stopped]
    assert points(drawn["predictions"], "search's prompts") == [(one.predicted, one.speedup.value) for one in whole]
    assert len(points(drawn["predictions"], "held-out prompts")) == 3


def test_every_prompt_is_a_mark_and_every_group_a_total(searched, drawn):
    single = [trace for trace in drawn["prompts"].figure.data if not trace.name]
    assert sum(len(trace.x) for trace in single) == len(searched.measurements)
    totals = [trace for trace in drawn["prompts"].figure.data if trace.name]
    assert sum(len(trace.x) for trace in totals) == len({(r.trial, r.prompt_set) for r in searched.measurements})
    for trace in totals:
        assert all(
            low >= 0 and high >= 0 for low, high in zip(trace.error_x.arrayminus, trace.error_x.array, strict=True)
        )


def test_each_sublayer_has_the_acceptance_rate_without_it(searched, drawn):
    by_kind = [dict(points(drawn["sublayers"], f"{kind} evaluated directly")) for kind in ("attention", "MLP")]
    rates = {2 * layer + kind: rate for kind in (0, 1) for layer, rate in by_kind[kind].items()}
    assert rates == searched.single_sublayer_acceptance
    assert len(rates) == 12


def test_a_figure_says_as_a_table_what_it_shows(searched, drawn):
    for picture in drawn.values():
        assert {len(row) for row in picture.table.rows} == {len(picture.table.columns)}
    assert len(drawn["history"].table.rows) == len(searched.trials)
    assert [row[0] for row in drawn["skip-map"].table.rows] == [str(one.number) for one in searched.ranked[:5]]


def test_every_figure_can_be_drawn_in_any_width_and_moves_no_page_under_a_finger(drawn):
    for picture in drawn.values():
        layout = go.Figure(picture.figure).layout
        assert layout.width is None
        assert layout.height >= 300
        assert layout.template.layout.dragmode is False


@given(st.floats(0, 1), st.floats(0.05, 1), st.integers(1, 8))
def test_the_ideal_is_the_best_of_all_lengths_by_the_published_formula(rate, cost, longest):
    def verifying(tokens):
        return 1 + 0.1 * (tokens - 1)

    def speedup(length):
        tokens = length + 1 if rate == 1 else (1 - rate ** (length + 1)) / (1 - rate)
        return tokens / (length * cost + verifying(length + 1))

    expected = max(speedup(length) for length in range(1, longest + 1))
    assert best_speedup(rate, cost, verifying, longest) == pytest.approx(expected, rel=1e-6)
