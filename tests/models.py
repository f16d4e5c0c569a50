"""Tiny random models, and what the tests hold them against."""

from functools import partial

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from layerskip.drafts.layers import LayerWeights

VOCABULARY = 64
LAYERS = 4
CONTEXT = 64
WINDOW = 5

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_llama(*, seed=0, attention="sdpa", **settings):
    """A random Llama with grouped queries whose output depends on every sublayer."""
    config = LlamaConfig(**_SIZES | settings, attn_implementation=attention)
    return _random_weights(LlamaForCausalLM(config), seed, norm=1.0)


def tiny_gemma2(*, seed=0, **settings):
    """A random Gemma-2: grouped queries, soft caps that bite, its own query scale, a window in every other layer."""
    own = {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 3,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": False,  # tied, a random model would repeat its last token for ever
    }
    config = Gemma2Config(**_SIZES | own | settings, attn_implementation="eager")
    return _random_weights(Gemma2ForCausalLM(config), seed, norm=0.0)


FAMILIES = {
    "llama-sdpa": partial(tiny_llama, attention="sdpa"),
    "llama-eager": partial(tiny_llama, attention="eager"),
    "gemma2": tiny_gemma2,
}


def _random_weights(model, seed, *, norm):
    """Weights so large that no sublayer is a rounding error; norm weights spread around ``norm``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(norm, 0.3, generator=generator)
            else:
                weight.normal_(0, 0.3, generator=generator)
    return model.eval()


def tiny_tokenizer(merges=(("s", "t"), ("o", "p"), ("st", "op"))):
    """One token a byte, and a few longer ones, so that strings and characters span tokens."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), "<end>"]
    tokenizer = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@torch.inference_mode()
def reference_logits(model, tokens, skip_set=None):
    """The forward pass over a whole text, written out: no cache, own masks, none of layerskip's code.

    Args:
        model: A transformers model.
        tokens: The token ids of a text.
        skip_set: Anything with ``attention`` and ``mlp``, the layers to leave out there.
    """
    decoder, config = model.model, model.config
    skipped_attention = skip_set.attention if skip_set else ()
    skipped_mlp = skip_set.mlp if skip_set else ()
    positions = torch.arange(len(tokens))
    distance = positions[:, None] - positions[None, :]
    x = decoder.embed_tokens(torch.tensor([tokens]))
    rotary = decoder.rotary_emb(x, positions[None])
    for i, layer in enumerate(decoder.layers):
        window = config.sliding_window if config.model_type == "gemma2" and i % 2 == 0 else len(tokens)
        hidden = (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
        if i not in skipped_attention:
            change, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)
            if config.model_type == "gemma2":
                change = layer.post_attention_layernorm(change)
            x = x + change
        if i not in skipped_mlp:
            if config.model_type == "gemma2":
                x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
            else:
                x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits = model.lm_head(decoder.norm(x))[0]
    if config.model_type == "gemma2":
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits


def transformers_greedy(model, prompt, max_new_tokens, eos_token_ids=None):
    """The new tokens of ``model.generate(do_sample=False)``."""
    out = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(eos_token_ids) if eos_token_ids else None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


NEAR_TIE = 1e-3


@torch.inference_mode()
def near_tie_or_same(model, prompt, ours, expected):
    """Assert that two greedy outputs are the same, or part only where the full model's two best logits nearly tie.

    Returns:
        Whether they part, so that near ties can be counted.
    """
    if ours == expected:
        return False
    at = next((i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), None)
    assert at is not None, f"one output stops early: {len(ours)} tokens, expected {len(expected)}"
    text = torch.tensor([[*prompt, *expected[:at]]], device=model.device)
    best = model(text).logits[0, -1].float().topk(2)
    gap = float(best.values[0] - best.values[1])
    assert gap < NEAR_TIE, f"token {at} is {ours[at]}, expected {expected[at]}; the two best logits lie {gap:.4f} apart"
    assert {ours[at], expected[at]} == set(best.indices.tolist())
    return True


def random_layers(model, runs, *, like=1, seed=0):
    """Random decoder layers that stand for runs of sublayers, ``{start: stop}``, by the index of the run's first."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for start, stop in runs.items():
        copied = LayerWeights.copied(model, start, stop, like)
        noise = {
            name: weight + 0.3 * torch.randn(weight.shape, generator=generator)
            for name, weight in copied.weights.items()
        }
        layers[start] = LayerWeights(start, stop, like, noise)
    return layers
