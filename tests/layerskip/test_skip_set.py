"""Skip sets are checked when made, and say what they are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip import SkipSet
from layerskip.errors import InvalidInputError
from tests.strategies import masks


@given(masks(5))
def test_a_mask_survives_the_round_trip(mask):
    skip_set = SkipSet.from_mask(mask)
    assert list(skip_set.mask) == mask
    assert SkipSet.from_mask(skip_set.mask) == skip_set
    assert skip_set.num_layers == 5


@given(masks(5))
def test_the_views_of_a_skip_set_agree(mask):
    skip_set = SkipSet.from_mask(mask)
    assert len(skip_set) == sum(mask)
    assert list(skip_set.kept) == [i for i, skipped in enumerate(mask) if not skipped]
    assert list(skip_set.skips_attention) == mask[0::2]
    assert list(skip_set.skips_mlp) == mask[1::2]
    assert skip_set.attention == tuple(i for i in range(5) if mask[2 * i])
    assert skip_set.mlp == tuple(i for i in range(5) if mask[2 * i + 1])


@given(masks(5))
def test_sublayers_may_be_named_by_their_indices_in_any_order(mask):
    indices = [index for index, skipped in enumerate(mask) if skipped]
    assert SkipSet.of_sublayers(reversed(indices), 5).mask == tuple(mask)


@given(masks(5))
def test_runs_are_the_skipped_sublayers_each_run_as_long_as_it_can_be(mask):
    runs = SkipSet.from_mask(mask).runs
    skipped = [index for start, stop in runs for index in range(start, stop)]
    assert skipped == [index for index, flag in enumerate(mask) if flag]
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(runs))


@given(st.integers(1, 4))
def test_an_early_exit_skips_one_run_up_to_the_top(keep):
    skip_set = SkipSet.early_exit(5, keep)
    assert skip_set.runs == ((2 * keep, 10),)
    assert skip_set.kept == tuple(range(2 * keep))


@pytest.mark.parametrize("keep", [0, 5])
def test_an_exit_keeps_some_layers_and_leaves_some_out(keep):
    with pytest.raises(InvalidInputError, match=f"^exit: expected 1 to 4, layers of the model to keep, got {keep}$"):
        SkipSet.early_exit(5, keep)


@given(st.permutations([0, 2, 3]), st.permutations([1, 4]))
def test_the_order_in_which_layers_are_named_does_not_matter(attention, mlp):
    skip_set = SkipSet(5, attention, mlp)
    assert skip_set == SkipSet(5, (0, 2, 3), (1, 4))
    assert hash(skip_set) == hash(SkipSet(5, (0, 2, 3), (1, 4)))
    assert skip_set.attention == (0, 2, 3)


@pytest.mark.parametrize(
    "other",
    [SkipSet(5, (1,)), SkipSet(4, (2,)), SkipSet(4, (), (1,)), SkipSet(4)],
    ids=lambda s: f"{s.num_layers}: {s}",
)
def test_different_skip_sets_are_unequal(other):
    assert SkipSet(4, (1,)) != other
    assert len({SkipSet(4, (1,)), other}) == 2


def test_a_skip_set_cannot_be_changed():
    with pytest.raises(AttributeError):
        SkipSet(4).attention = (1,)


@pytest.mark.parametrize(
    ("attention", "mlp", "text"),
    [
        ((3, 5, 6, 7, 8), (2,), "attn 3,5-8 · mlp 2"),
        ((0, 1), (), "attn 0-1"),
        ((), (0, 2, 4), "mlp 0,2,4"),
        ((), (), "nothing skipped"),
    ],
)
def test_a_skip_set_prints_as_ranges_of_layers(attention, mlp, text):
    assert str(SkipSet(10, attention, mlp)) == text


def layers_in(text):
    """Read ``3,5-8`` back."""
    ends = [part.split("-") for part in text.split(",")]
    return tuple(layer for end in ends for layer in range(int(end[0]), int(end[-1]) + 1))


@given(masks(12))
def test_the_printed_form_names_exactly_the_skipped_layers(mask):
    skip_set = SkipSet.from_mask(mask)
    named = dict(part.split(" ") for part in str(skip_set).split(" · ")) if len(skip_set) else {}
    assert layers_in(named["attn"]) == skip_set.attention if "attn" in named else not skip_set.attention
    assert layers_in(named["mlp"]) == skip_set.mlp if "mlp" in named else not skip_set.mlp


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((-1,), "{kind}: layer -1 is out of range; the model has layers 0 to 3"),
        ((0, 4), "{kind}: layer 4 is out of range; the model has layers 0 to 3"),
        ((2, 1, 2), "{kind}: layer 2 is named twice; name each skipped layer once"),
    ],
)
def test_a_bad_layer_is_refused_by_name(kind, layers, message):
    with pytest.raises(InvalidInputError) as error:
        SkipSet(4, **{kind: layers})
    assert str(error.value) == message.format(kind=kind)


def test_skipping_everything_is_refused():
    with pytest.raises(InvalidInputError, match="all 4 sublayers are skipped; a draft must keep at least one"):
        SkipSet(2, (0, 1), (0, 1))
    with pytest.raises(InvalidInputError, match="all 4 sublayers"):
        SkipSet.from_mask([True] * 4)


@pytest.mark.parametrize("num_layers", [0, -1])
def test_a_model_without_layers_is_refused(num_layers):
    with pytest.raises(InvalidInputError, match="num_layers: expected at least 1"):
        SkipSet(num_layers)


@pytest.mark.parametrize("mask", [[], [True], [False] * 5])
def test_a_mask_that_does_not_fit_whole_layers_is_refused(mask):
    with pytest.raises(InvalidInputError, match=f"two flags for each layer, got {len(mask)}"):
        SkipSet.from_mask(mask)
