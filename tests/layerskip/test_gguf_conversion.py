"""A GGUF file is read whole, or refused in one line; a bad copy is never kept."""

import numpy as np
import pytest
import torch

from layerskip import LayerSkipModel, generate, load_checkpoint
from layerskip.errors import CheckpointError
from tests.models import near_tie_or_same, tiny_llama, tiny_tokenizer, transformers_greedy

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from tests.gguf_files import tensors_of, write_gguf  # noqa: E402

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=len(tiny_tokenizer()), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tensors(model):
    return dict(tensors_of(model))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache):
    return list(cache.iterdir()) if cache.exists() else []


def error_of(path):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(str(path), device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_becomes_the_model_that_it_was_made_from(tmp_path, model):
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer())
    loaded = load_checkpoint(str(tmp_path / "tiny.gguf"), device="cpu")
    ours = generate(LayerSkipModel(loaded.model), PROMPT, max_new_tokens=12, eos_token_ids=()).tokens
    near_tie_or_same(model, PROMPT, ours, transformers_greedy(model, PROMPT, 12))
    assert loaded.tokenizer.decode(loaded.tokenizer("stop it").input_ids) == "stop it"


def test_a_suffix_in_capitals_is_one_too(tmp_path, model):
    write_gguf(tmp_path / "TINY.GGUF", model, tiny_tokenizer())
    assert load_checkpoint(str(tmp_path / "TINY.GGUF"), device="cpu").model.config.num_hidden_layers == 4


def test_a_folder_that_is_called_like_a_file_is_a_folder(tmp_path, model):
    folder = tmp_path / "model.gguf"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert load_checkpoint(str(folder), device="cpu").model.config.num_hidden_layers == 4


@pytest.mark.parametrize("lost", ["blk.2.", "output_norm.weight", "blk.3.ffn_up.weight"])
def test_a_file_that_lacks_tensors_is_refused_and_nothing_is_kept(tmp_path, cache, model, tensors, lost):
    left = {name: values for name, values in tensors.items() if not name.startswith(lost)}
    write_gguf(tmp_path / "less.gguf", model, tiny_tokenizer(), tensors=left)
    assert f"model '{tmp_path / 'less.gguf'}': lacks model." in error_of(tmp_path / "less.gguf")
    assert not kept(cache)


@pytest.mark.parametrize(
    ("name", "shape"), [("blk.0.attn_q.bias", 32), ("rope_freqs.weight", 4), ("blk.1.attn_q_norm.weight", 8)]
)
def test_a_file_with_tensors_that_would_be_left_out_is_refused(tmp_path, cache, model, tensors, name, shape):
    more = tensors | {name: np.full(shape, 2.0, np.float32)}
    write_gguf(tmp_path / "more.gguf", model, tiny_tokenizer(), tensors=more)
    assert f"has what transformers does not read: {name}; its text would be another model's" in error_of(
        tmp_path / "more.gguf"
    )
    assert not kept(cache)


def test_a_tensor_of_another_shape_is_refused(tmp_path, cache, model, tensors):
    other = tensors | {"output_norm.weight": np.ones(8, np.float32)}
    write_gguf(tmp_path / "other.gguf", model, tiny_tokenizer(), tensors=other)
    assert "has another shape than its metadata says: model.norm.weight" in error_of(tmp_path / "other.gguf")
    assert not kept(cache)


def test_factors_of_one_are_none(tmp_path, model, tensors):
    more = tensors | {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "ones.gguf", model, tiny_tokenizer(), tensors=more)
    assert load_checkpoint(str(tmp_path / "ones.gguf"), device="cpu").model.config.num_hidden_layers == 4


def test_a_scaling_of_positions_that_would_be_left_out_is_refused(tmp_path, cache, model):
    def scaled(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    write_gguf(tmp_path / "scaled.gguf", model, tiny_tokenizer(), metadata=scaled)
    assert "has what transformers does not read: llama.rope.scaling.type" in error_of(tmp_path / "scaled.gguf")
    assert not kept(cache)


def test_a_text_ends_where_a_turn_ends_too(tmp_path, model):
    write_gguf(tmp_path / "turns.gguf", model, tiny_tokenizer(), metadata=lambda writer: writer.add_eot_token_id(5))
    loaded = load_checkpoint(str(tmp_path / "turns.gguf"), device="cpu")
    assert LayerSkipModel(loaded.model).eos_token_ids == {tiny_tokenizer().eos_token_id, 5}


@pytest.fixture
def parts(tmp_path, model, tensors):
    """A model in three files."""
    names = sorted(tensors)
    files = []
    for number in range(3):
        files.append(tmp_path / f"split-{number + 1:05}-of-00003.gguf")
        own = {name: tensors[name] for name in names[number::3]}

        def split(writer, number=number):
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 3)

        write_gguf(files[-1], model, tiny_tokenizer(), tensors=own, metadata=split)
    return files


@pytest.mark.parametrize("given", range(3))
def test_a_model_in_several_files_is_read_from_all_of_them(parts, model, given):
    loaded = load_checkpoint(str(parts[given]), device="cpu")
    ours, theirs = loaded.model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_part_that_is_missing_is_named(parts, cache):
    parts[1].unlink()
    assert error_of(parts[0]).endswith("is one of 3 files, and split-00002-of-00003.gguf is not beside it")
    assert not kept(cache)
