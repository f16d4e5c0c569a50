"""The reference run: what the target model writes and computes, kept on disk."""

import os
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import LayerSkipModel, generate
from layerskip.errors import LayerSkipError
from layerskip.utils import write_bytes_atomically
from search.reference import ReferenceRun, ReferenceText, batch_generate, record
from tests.models import LAYERS, NEAR_TIE, near_tie_or_same, reference_logits, tiny_llama
from tests.search.searches import encoded_prompt, random_prompts
from tests.strategies import tokens

PROMPTS = random_prompts(search=3).search
TENSORS = ("tokens", "choices", "confidence", "states", "keys", "values")


@contextmanager
def passes_counted(model):
    """How many forward passes the model made so far, as the length of a list."""
    passes = []
    handle = model.hf_model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()


def same(one, other):
    """Whether two texts are equal, tensor for tensor."""
    if one.prompt_length != other.prompt_length:
        return False
    pairs = [(getattr(one, name), getattr(other, name)) for name in TENSORS]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else all(map(torch.equal, a, b)) and len(a) == len(b)
        for a, b in pairs
    )


@given(prompts=st.lists(tokens(9), min_size=1, max_size=4), count=st.integers(1, 9))
@settings(max_examples=15)
def test_prompts_of_any_lengths_are_continued_as_each_alone_would_be(tiny, prompts, count):
    written = batch_generate(tiny, prompts, count)
    for prompt, new in zip(prompts, written, strict=True):
        near_tie_or_same(tiny.hf_model, prompt, new, generate(tiny, prompt, max_new_tokens=count).tokens)


@given(prompt=tokens(9), new=tokens(9))
@settings(max_examples=15)
@torch.inference_mode()
def test_choices_are_the_likeliest_tokens_of_the_full_model_and_the_states_are_its_own(tiny, prompt, new):
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


def test_a_text_ends_with_the_end_of_sequence_token():
    hf_model = tiny_llama()
    model = LayerSkipModel(hf_model)
    prompt = PROMPTS[0].tokens
    longest = batch_generate(model, [prompt], 9)[0]
    hf_model.generation_config.eos_token_id = longest[3]
    other = [p.tokens for p in PROMPTS[1:]]
    ended, *others = batch_generate(model, [prompt, *other], 9)
    assert ended == longest[: longest.index(longest[3]) + 1]
    for tokens_, new in zip(other, others, strict=True):
        assert new == generate(model, tokens_, max_new_tokens=9).tokens


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


def test_a_file_without_all_that_a_text_has_is_no_text(llama, tmp_path):
    text = record(llama, [1, 2], [3, 4])
    write_bytes_atomically(tmp_path / "whole", text.to_bytes())
    assert same(ReferenceText.from_file(tmp_path / "whole"), text)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "whole")
    save_file({name: t for name, t in tensors.items() if name != "states"}, tmp_path / "part")
    with pytest.raises(ValueError, match="not a reference text"):
        ReferenceText.from_file(tmp_path / "part")


def test_each_model_dtype_and_way_of_asking_has_a_reference_of_its_own(llama, tmp_path):
    for model, fingerprint in [(llama, "f"), (llama, "g"), (LayerSkipModel(tiny_llama().bfloat16()), "f")]:
        ReferenceRun(model, tmp_path, fingerprint).texts(PROMPTS[:1], max_new_tokens=3)
    assert len(list(tmp_path.glob("reference-*"))) == 3
    run = ReferenceRun(llama, tmp_path, "f")
    for named in ({"max_new_tokens": 4}, {"max_new_tokens": 3, "states": 2}):
        run.texts(PROMPTS[:1], **named)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    [short] = run.texts(PROMPTS[:1], max_new_tokens=3)
    assert (short.new_tokens, short.states.shape[1]) == (3, 2)


def test_only_the_references_used_last_are_kept(llama, tmp_path):
    for age, name in enumerate(["a", "b", "c", "d"]):
        ReferenceRun(llama, tmp_path, name)
        newest = max(tmp_path.iterdir(), key=lambda folder: folder.stat().st_mtime)
        os.utime(newest, (age, age))
    before = set(tmp_path.iterdir())
    ReferenceRun(llama, tmp_path, "a")  # used again, so that "b" is the oldest
    assert set(tmp_path.iterdir()) == before
    ReferenceRun(llama, tmp_path, "e")
    left = set(tmp_path.iterdir())
    assert len(left) == 4
    [gone] = before - left
    assert ReferenceRun(llama, tmp_path, "b")._folder == gone


@pytest.mark.parametrize("blocked", ["", "below"])
def test_a_folder_that_cannot_be_written_is_one_line_that_says_what_to_do(llama, tmp_path, blocked):
    (tmp_path / "file").write_text("")
    with pytest.raises(LayerSkipError) as caught:
        ReferenceRun(llama, tmp_path / "file" / blocked, "f")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/file")
    assert "LAYERSKIP_CACHE" in message
    assert "\n" not in message


def test_a_folder_that_vanishes_in_between_is_one_line_too(llama, tmp_path):
    run = ReferenceRun(llama, tmp_path, "f")
    [folder] = tmp_path.iterdir()
    folder.rmdir()
    with pytest.raises(LayerSkipError, match="cannot keep the reference run: No such file"):
        run.texts([encoded_prompt("p", [1, 2])], max_new_tokens=2)
