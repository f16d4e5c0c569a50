"""The target model's texts: decoded in batches as each alone would be, and kept on disk whole or not at all."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from layerskip import LayerSkipModel, generate
from layerskip.errors import LayerSkipError
from layerskip.target_texts import TargetText, TextStore, batch_generate
from tests.models import near_tie_or_same, tiny_llama
from tests.strategies import tokens

PROMPTS = [[5, 1, 7], [2], [9, 9, 3, 4]]


def some_text(n=6, prompt_length=2, layers=2):
    """A text of random content."""
    random = torch.Generator().manual_seed(n)
    asked = n - prompt_length - 1
    past = [tuple(torch.randn(2, n, 4, generator=random) for _ in range(layers)) for _ in range(2)]
    return TargetText(
        torch.randint(0, 64, (n,), generator=random),
        prompt_length,
        torch.randint(0, 64, (asked,), generator=random),
        torch.rand(asked, generator=random),
        torch.randn(3, asked, 8, generator=random).bfloat16(),
        *past,
    )


def same(text, other):
    """Whether two texts are equal, tensor for tensor."""
    a, b = text.tensors, other.tensors
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@given(prompts=st.lists(tokens(9), min_size=1, max_size=4), count=st.integers(1, 9))
@settings(max_examples=15)
def test_prompts_of_any_lengths_are_continued_as_each_alone_would_be(tiny, prompts, count):
    written = batch_generate(tiny, prompts, count)
    for prompt, new in zip(prompts, written, strict=True):
        near_tie_or_same(tiny.hf_model, prompt, new, generate(tiny, prompt, max_new_tokens=count).tokens)


def test_a_text_ends_with_the_end_of_sequence_token():
    hf_model = tiny_llama()
    model = LayerSkipModel(hf_model)
    prompt, *others = PROMPTS
    longest = batch_generate(model, [prompt], 9)[0]
    hf_model.generation_config.eos_token_id = longest[3]
    ended, *written = batch_generate(model, [prompt, *others], 9)
    assert ended == longest[: longest.index(longest[3]) + 1]
    for other, new in zip(others, written, strict=True):
        assert new == generate(model, other, max_new_tokens=9).tokens


@pytest.mark.parametrize("layers", [0, 2])
def test_texts_are_read_as_they_were_written(llama, tmp_path, layers):
    texts = [some_text(n, layers=layers) for n in range(3, 15)]
    store = TextStore(llama, "f", tmp_path, "kind")
    assert store.find("name") is None
    store.write("name", texts)
    again = TextStore(llama, "f", tmp_path, "kind")
    assert [same(*pair) for pair in zip(again.read("name"), texts, strict=True)] == [True] * len(texts)
    assert again.find("other") is None


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", slice(0, -7), slice(0, 40)])
def test_a_damaged_file_holds_no_texts(llama, tmp_path, damage):
    store = TextStore(llama, "f", tmp_path, "kind")
    store.write("name", [some_text()])
    [victim] = store.folder.iterdir()
    content = victim.read_bytes()
    victim.write_bytes(damage if isinstance(damage, bytes) else content[damage])
    assert store.find("name") is None
    with pytest.raises(LayerSkipError, match=r"^[^\n]*name.safetensors: removed or damaged [^\n]*$"):
        store.read("name")


@pytest.mark.parametrize("missing", ["0.states", "1.prompt_length", "1.values.1"])
def test_a_file_without_all_that_a_text_has_holds_no_texts(llama, tmp_path, missing):
    store = TextStore(llama, "f", tmp_path, "kind")
    store.write("name", [some_text(), some_text(7)])
    [path] = store.folder.iterdir()
    save_file({name: tensor.clone() for name, tensor in load_file(path).items() if name != missing}, path)
    assert store.find("name") is None


def test_each_model_dtype_kind_and_settings_have_a_store_of_their_own(llama, tmp_path):
    half = LayerSkipModel(tiny_llama().bfloat16())
    ways = [(llama, "f", "a"), (llama, "g", "a"), (half, "f", "a"), (llama, "f", "b"), (llama, "f", "a", {"exit": 1})]
    folders = {TextStore(model, fingerprint, tmp_path, *rest).folder for model, fingerprint, *rest in ways}
    assert len(folders) == len(ways)


def test_only_the_stores_of_a_kind_used_last_are_kept(llama, tmp_path):
    def store(name):
        return TextStore(llama, name, tmp_path, "kind").folder

    other = TextStore(llama, "a", tmp_path, "other").folder
    os.utime(other, (0, 0))
    for age, name in enumerate(["a", "b", "c", "d"]):
        os.utime(store(name), (age, age))
    before = set(tmp_path.glob("kind-*"))
    store("a")  # used again, so that "b" is the oldest
    assert set(tmp_path.glob("kind-*")) == before
    store("e")
    left = set(tmp_path.glob("kind-*"))
    assert len(left) == 4
    [gone] = before - left
    assert store("b") == gone
    assert other.exists()


def test_folders_that_are_no_stores_are_left_alone(llama, tmp_path):
    others = {"kind-of-mine", "kind-0", "kind-0123456789abcdef-backup"}
    for name in others:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    for age, name in enumerate("abcde", start=1):
        folder = TextStore(llama, name, tmp_path, "kind").folder
        os.utime(folder, (age, age))
    left = {path.name for path in tmp_path.iterdir()}
    assert others < left
    assert len(left - others) == 4


def test_a_store_that_was_written_or_read_in_the_last_day_stays(llama, tmp_path):
    stores = [TextStore(llama, str(number), tmp_path, "kind") for number in range(6)]
    for store in stores:
        store.write("name", [some_text()])
    assert all(store.folder.exists() for store in stores)
    for store in stores:
        os.utime(store.folder, (0, 0))
    read, written, *unused = stores
    read.find("name")
    written.write("other", [some_text()])
    for number in range(6, 10):
        TextStore(llama, str(number), tmp_path, "kind")
    assert {store.folder for store in (read, written)} <= set(tmp_path.glob("kind-*"))
    assert not any(store.folder.exists() for store in unused)


@pytest.mark.parametrize("blocked", ["", "below"])
def test_a_folder_that_cannot_be_written_is_one_line_that_says_what_to_do(llama, tmp_path, blocked):
    (tmp_path / "file").write_text("")
    with pytest.raises(LayerSkipError) as caught:
        TextStore(llama, "f", tmp_path / "file" / blocked, "kind")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/file")
    assert "LAYERSKIP_CACHE" in message
    assert "\n" not in message


def test_a_folder_that_vanishes_in_between_is_one_line_too(llama, tmp_path):
    store = TextStore(llama, "f", tmp_path, "kind")
    store.folder.rmdir()
    with pytest.raises(LayerSkipError, match="cannot keep the target model's texts: No such file"):
        store.write("name", [some_text()])
