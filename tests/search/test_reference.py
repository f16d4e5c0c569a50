"""The reference run: what the target model writes and computes, kept on disk."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.reference import ReferenceRun, record
from tests.layerskip.test_target_texts import same
from tests.models import LAYERS, NEAR_TIE, reference_logits
from tests.search.searches import random_prompts
from tests.strategies import tokens

PROMPTS = random_prompts(search=3).search


@contextmanager
def passes_counted(model):
    """A list that grows by one with every forward pass of the model."""
    passes = []
    handle = model.hf_model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()


@given(prompt=tokens(9), new=tokens(9))
@settings(max_examples=15)
@torch.inference_mode()
def test_choices_are_the_likeliest_tokens_of_the_target_model_and_the_states_are_its_own(tiny, prompt, new):
    text = record(tiny, prompt, new)
    asked = slice(len(prompt), len(prompt) + len(new) - 1)
    logits = reference_logits(tiny.hf_model, [*prompt, *new])[asked]
    assert text.tokens.tolist() == [*prompt, *new]
    assert (text.prompt_length, text.new_tokens) == (len(prompt), len(new))
    assert text.choices.shape == text.confidence.shape == (len(new) - 1,)
    best = logits.gather(1, text.choices[:, None])[:, 0]
    assert (logits.amax(-1) - best < NEAR_TIE).all()
    assert torch.allclose(text.confidence, logits.softmax(-1).amax(-1), atol=1e-4)
    assert text.states.shape == (2 * LAYERS + 1, len(new) - 1, 32)
    assert torch.equal(text.states[0], tiny.embed(text.tokens)[0, asked])
    assert torch.allclose(tiny.logits(text.states[-1][None]), logits, atol=1e-2)
    assert {kv.shape[1] for kv in (*text.keys, *text.values)} == {len(prompt) + len(new)}


@given(st.integers(1, 40))
@settings(max_examples=15)
def test_states_may_be_taken_from_all_over_a_text(llama, count):
    text = record(llama, [1, 2, 3], [4, 5, 6, 7], states=count)
    assert text.states.shape[1] == min(count, 7)
    whole = record(llama, [1, 2, 3], [4, 5, 6, 7], states=7).states
    assert torch.equal(text.states[:, 0], whole[:, 0])
    assert count == 1 or torch.equal(text.states[:, -1], whole[:, -1])


def test_what_was_decoded_once_is_read_from_disk_ever_after(llama, tmp_path):
    first_run, second_run, third_run = (ReferenceRun(llama, tmp_path, "f") for _ in range(3))
    first = first_run.texts(PROMPTS, max_new_tokens=5)
    with passes_counted(llama) as passes:
        again = second_run.texts(PROMPTS, max_new_tokens=5)
        assert not passes
        more = third_run.texts(random_prompts(search=4).search, max_new_tokens=5)
        assert len(passes) <= 5 + 1  # of the new prompt alone: its tokens, and the pass that records them
    assert [run.found for run in (first_run, second_run, third_run)] == [0, 3, 3]
    assert all(map(same, first, again))
    assert all(map(same, first, more))
    assert [text.prompt_length for text in again] == [len(prompt.tokens) for prompt in PROMPTS]


def test_progress_counts_texts_that_are_there_and_shares_of_those_being_decoded(llama, tmp_path):
    done: list[float] = []
    run = ReferenceRun(llama, tmp_path, "f", done.append)
    first = run.texts(PROMPTS[:1], max_new_tokens=5)
    assert len(first[0].tokens) == len(PROMPTS[0].tokens) + 5
    assert done == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    done.clear()
    run.texts(PROMPTS, max_new_tokens=5)  # of these, the first is there
    assert done[0] == pytest.approx(2 + 2 / 5)
    assert done[-1] == 1 + 3
    assert done == sorted(done)


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", slice(0, -7), slice(0, 40)])
def test_a_damaged_file_is_made_anew(llama, tmp_path, damage):
    run = ReferenceRun(llama, tmp_path, "f")
    whole = run.texts(PROMPTS, max_new_tokens=5)
    [victim, *_] = sorted(tmp_path.rglob("*.safetensors"))
    content = victim.read_bytes()
    victim.unlink()  # the texts above may still be read from it
    victim.write_bytes(damage if isinstance(damage, bytes) else content[damage])
    mended = run.texts(PROMPTS, max_new_tokens=5)
    assert all(map(same, whole, mended))
    assert victim.read_bytes() == content


def test_each_way_of_asking_has_a_text_of_its_own(llama, tmp_path):
    run = ReferenceRun(llama, tmp_path, "f")
    for settings_ in ({"max_new_tokens": 3}, {"max_new_tokens": 4}, {"max_new_tokens": 3, "states": 2}):
        run.texts(PROMPTS[:1], **settings_)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    [short] = run.texts(PROMPTS[:1], max_new_tokens=3)
    assert (short.new_tokens, short.states.shape[1]) == (3, 2)
