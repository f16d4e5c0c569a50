"""Tiny GGUF files, as llama.cpp's converter writes them."""

import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

TOKENIZER = "tokenizer.ggml"


def _as_llama_cpp(name, weight, config):
    """Queries and keys in llama.cpp's order of rotary pairs."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if f"{part}.weight" in name), None)
    if count is None:
        return weight
    return weight.view(count, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def tensors_of(model):
    """A tiny llama's tensors by their names in GGUF files."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        base, _, kind = key.rpartition(".")
        yield f"{names.get_name(base)}.{kind}", _as_llama_cpp(key, weight, model.config).float().numpy()


def write_gguf(path, model, tokenizer, *, tensors=None, metadata=lambda writer: None):
    """Write a tiny llama with its tokenizer.

    Args:
        path: The file.
        model: The model.
        tokenizer: From :func:`tests.models.tiny_tokenizer`.
        tensors: Its tensors by name; None writes all of them.
        metadata: Called with the writer, to add more.
    """
    config, vocabulary = model.config, tokenizer.get_vocab()
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges(["s t", "o p", "st op"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    metadata(writer)
    for name, values in (dict(tensors_of(model)) if tensors is None else tensors).items():
        writer.add_tensor(name, torch.from_numpy(values.copy()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
