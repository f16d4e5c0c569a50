"""Tiny random models, and what the tests hold them against."""

import copy
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from layerskip import DraftConfig, SkipSet, families
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.heads import untrained_heads

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


LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"] * (LAYERS // 2)

# What each family has that Llama has not, with values that show in the output of a tiny model. A family without an
# entry needs none.
OWN_SETTINGS = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "smollm3": {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layers": [1, 0, 1, 0]},
    "phi3": {
        "sliding_window": WINDOW,
        "resid_pdrop": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": LOCAL_AND_GLOBAL,
        "query_pre_attn_scalar": 3,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": LOCAL_AND_GLOBAL,
        "query_pre_attn_scalar": 3,
        "final_logit_softcapping": 4.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        },
    },
    "olmo3": {
        "sliding_window": WINDOW,
        "layer_types": LOCAL_AND_GLOBAL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
        },
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.8,
    },
}


def tiny_model(family, *, seed=0, attention=None, **settings):
    """A random model of a family whose output depends on every sublayer and on every twist of the family.

    Args:
        family: A model type.
        seed: Of the weights.
        attention: The attention implementation; None takes transformers' choice.
        settings: Of the configuration, in place of the tiny ones.
    """
    # Embeddings are not tied unless asked: tied, a random model would repeat its last token for ever.
    all_settings = _SIZES | {"tie_word_embeddings": False} | copy.deepcopy(OWN_SETTINGS.get(family, {})) | settings
    for name in ("layer_types", "no_rope_layers"):
        if name in all_settings and name not in settings:
            all_settings[name] = list(islice(cycle(all_settings[name]), all_settings["num_hidden_layers"]))
    config = AutoConfig.for_model(family, **all_settings)
    if attention is None and getattr(config, "attn_logit_softcapping", None):
        attention = "eager"  # sdpa has no soft-capping, and not every version of transformers knows
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return _random_weights(model, seed, norm=0.0 if family.startswith("gemma") else 1.0)


def tiny_llama(*, seed=0, attention="sdpa", **settings):
    """A random Llama with grouped queries."""
    return tiny_model("llama", seed=seed, attention=attention, **settings)


def tiny_gemma2(*, seed=0, **settings):
    """A random Gemma-2: grouped queries, soft caps that bite, its own query scale, a window in every other layer."""
    return tiny_model("gemma2", seed=seed, attention="eager", **settings)


# Enough for whatever does not depend on the family.
FAMILIES = {
    "llama-sdpa": partial(tiny_llama, attention="sdpa"),
    "llama-eager": partial(tiny_llama, attention="eager"),
    "gemma2": tiny_gemma2,
}
# Every family in layerskip's table, the next one too, with the attention that transformers chooses, and the other.
EVERY_FAMILY = {name: partial(tiny_model, name) for name in families.FAMILIES} | {
    f"{name}-eager": partial(tiny_model, name, attention="eager") for name in ("llama", "gemma3_text", "mistral")
}


def _random_weights(model, seed, *, norm):
    """Weights so large that no sublayer is a rounding error; norm weights spread around ``norm``, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            center = norm if weight.dim() == 1 and not name.endswith("bias") else 0
            weight.normal_(center, 0.3, generator=generator)
    return model.eval()


CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny_tokenizer(merges=(("s", "t"), ("o", "p"), ("st", "op"))):
    """One token a byte, and a few longer ones, so that strings and characters span tokens."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), "<end>"]
    tokenizer = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@torch.inference_mode()
def reference_logits(model, tokens, skip_set=None):
    """transformers' own forward pass over a whole text, with skipped modules made to answer nothing.

    No family's norm makes something of nothing, so the sublayer adds nothing to the hidden states.

    Args:
        model: A transformers model.
        tokens: The token ids of a text.
        skip_set: Anything with ``attention`` and ``mlp``, the layers to leave out there.
    """
    layers = model.model.layers
    with ExitStack() as hooks:
        for index in skip_set.attention if skip_set else ():
            hook = layers[index].self_attn.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), None))
            hooks.callback(hook.remove)
        for index in skip_set.mlp if skip_set else ():
            hooks.callback(layers[index].mlp.register_forward_hook(lambda _, __, out: torch.zeros_like(out)).remove)
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


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
    """Assert that two greedy outputs are the same, or part only where the target model's two best logits nearly tie.

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


def _with_noise(module, scale, seed):
    """The module with a random number added to each of its weights."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.state_dict().values():
        weight += (scale * torch.randn(weight.shape, generator=generator)).to(weight)
    return module


def random_layers(model, runs, *, like=1, seed=0):
    """Random draft layers for runs of sublayers, ``{start: stop}``."""
    copies = (DraftLayer.copied(model, start, stop, like) for start, stop in runs.items())
    return [_with_noise(layer, 0.3, seed + number) for number, layer in enumerate(copies)]


def head_config(model, stopping, **policy):
    """How to draft with heads: nothing of the stack is skipped."""
    return DraftConfig(SkipSet(model.num_layers), stopping=stopping, **policy)


def random_heads(model, kind, count=3, *, scale=0.1, seed=0):
    """Draft heads of which each says something else; the smaller the scale, the more they say what the model says."""
    return _with_noise(untrained_heads(kind, count, model.config.hidden_size), scale, seed)


def random_prefix(model, *, scale=0.1, seed=0, like=LAYERS - 1):
    """A layer after all sublayers for draft heads; the smaller the scale, the less it changes hidden states."""
    identity = DraftLayer.identity(model)
    layer = DraftLayer(model, identity.start, identity.stop, like, identity.layer.state_dict())
    return _with_noise(layer, scale, seed)
