"""A mask lets each new position see the positions before it, as far as the window reaches."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerskip.attention_masks import AttentionMasks, check_attention_implementation
from layerskip.errors import UnsupportedModelError


def may_see(past, width, window):
    """Rows: new positions; columns: all positions."""
    return [
        [key <= query and (window is None or query - key < window) for key in range(past + width)]
        for query in range(past, past + width)
    ]


def seen(mask, past, width, implementation):
    """What attention sees under a mask, None included."""
    if mask is None:  # attention functions take a pass without a mask as causal from the text's start, or as one query
        assert width == 1 or (past == 0 and implementation == "sdpa")
        return may_see(past, width, None)
    assert mask.shape == (1, 1, width, past + width)
    return (mask == 0)[0, 0].tolist()


@given(
    st.integers(0, 12),
    st.integers(1, 8),
    st.none() | st.integers(1, 10),
    st.sampled_from(["eager", "sdpa"]),
)
def test_each_new_position_sees_exactly_the_past_in_its_window(past, width, window, implementation):
    mask = AttentionMasks([window], implementation, torch.float32).causal(past, width, torch.device("cpu"))[window]
    assert seen(mask, past, width, implementation) == may_see(past, width, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_has_the_model_s_dtype_and_no_infinities(dtype):
    mask = AttentionMasks([None], "eager", dtype).causal(2, 3, torch.device("cpu"))[None]
    assert mask.dtype == dtype
    assert mask.isfinite().all()
    assert mask.softmax(-1)[0, 0, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0], abs=1e-2)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|eager", None])
def test_an_unknown_attention_implementation_is_refused(name):
    with pytest.raises(UnsupportedModelError, match="attn_implementation='eager' or 'sdpa'"):
        check_attention_implementation(SimpleNamespace(_attn_implementation=name))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_known_attention_implementation_passes(name):
    assert check_attention_implementation(SimpleNamespace(_attn_implementation=name)) == name


def test_soft_capping_is_never_left_out():
    capped = SimpleNamespace(_attn_implementation="sdpa", attn_logit_softcapping=50.0)
    with pytest.raises(UnsupportedModelError, match="leaves out this model's soft-capping"):
        check_attention_implementation(capped)
    capped._attn_implementation = "eager"
    assert check_attention_implementation(capped) == "eager"
