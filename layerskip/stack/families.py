"""How each model family names the parts of its sublayers. The only file that knows families.

A new family is one more row: where its norms sit around ``self_attn`` and ``mlp``, and nothing else. Everything a
family does inside those modules (grouped queries, soft-capping, query scaling) comes with the modules, which are
called and not re-implemented.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from layerskip.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Attribute names of the norms before and after the two sublayers of a decoder layer."""

    name: str
    before_attention: str
    before_mlp: str
    after_attention: str | None = None
    after_mlp: str | None = None


_PRE_NORM = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
_SANDWICH_NORM = {
    "before_attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", **_PRE_NORM),
        Family("gemma2", **_SANDWICH_NORM),
    )
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model, by its configuration's ``model_type``.

    Raises:
        UnsupportedModelError: The model type is not in the table, or a setting makes a pass over several tokens
            differ from one token at a time, so that no draft could be verified in one pass.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError("use_bidirectional_attention is set; only causal models can be decoded")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"rope type '{rope_type}' changes its frequencies as the text grows, so verifying several tokens in one "
            "pass would not give the tokens of plain decoding; use a model with a fixed rope type"
        )
    return family
