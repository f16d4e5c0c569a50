"""Model families: a table of the names by which their modules differ. No other file knows families.

A new family is one more row: where its norms are around ``self_attn`` and ``mlp``, and what it does between modules.
Everything a family does inside them (grouped queries, query and key norms, soft-capping, layers without rotary
embedding, the embedding scale of Gemma) comes with the modules, which are called, not re-implemented.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from layerskip.errors import UnsupportedModelError


def _no_window(config: PreTrainedConfig, layer: int) -> None:
    return None


def _one_window(config: PreTrainedConfig, layer: int) -> int | None:
    window: int | None = config.sliding_window
    return window


def _window_by_layer_type(config: PreTrainedConfig, layer: int) -> int | None:
    window: int | None = config.sliding_window if _layer_type(config, layer) == "sliding_attention" else None
    return window


def _one_rotary(config: PreTrainedConfig, layer: int) -> None:
    return None


def _layer_type(config: PreTrainedConfig, layer: int) -> str:
    kind: str = config.layer_types[layer]
    return kind


@dataclass(frozen=True)
class Norms:
    """Attribute names of the norms in a decoder layer; None where there is none.

    Args:
        before_attention: Before ``self_attn``.
        before_mlp: Before ``mlp``.
        after_attention: After ``self_attn``, before its output is added to the hidden states.
        after_mlp: After ``mlp``, likewise.
    """

    before_attention: str | None = None
    before_mlp: str | None = None
    after_attention: str | None = None
    after_mlp: str | None = None


PRE_NORM = Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
SANDWICH_NORM = Norms(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
POST_NORM = Norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """How a model connects its modules.

    Args:
        name: The ``model_type`` of its configurations.
        norms: The norms of a decoder layer.
        window: The sliding window of a layer, in positions; None where it sees the whole text.
        rotary: Which of the model's rotary embeddings a layer takes, by layer type; None where there is only one.
        embedding_multiplier: The setting by which embeddings are multiplied outside of the embedding module.
        residual_multiplier: The setting by which a sublayer's output is multiplied before it is added.
        logits_divisor: The setting by which the head's scores are divided.
    """

    name: str
    norms: Norms
    window: Callable[[PreTrainedConfig, int], int | None] = _no_window
    rotary: Callable[[PreTrainedConfig, int], str | None] = _one_rotary
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logits_divisor: str | None = None


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", PRE_NORM),
        Family("mistral", PRE_NORM, window=_one_window),
        Family("qwen2", PRE_NORM, window=_window_by_layer_type),
        Family("qwen3", PRE_NORM, window=_window_by_layer_type),
        Family("smollm3", PRE_NORM, window=_window_by_layer_type),
        Family("phi3", PRE_NORM, window=_one_window),  # its residual dropout does nothing in evaluation mode
        Family("gemma", PRE_NORM),
        Family("gemma2", SANDWICH_NORM, window=_window_by_layer_type),
        Family("gemma3_text", SANDWICH_NORM, window=_window_by_layer_type, rotary=_layer_type),
        Family("olmo2", POST_NORM),
        Family("olmo3", POST_NORM, window=_window_by_layer_type, rotary=_layer_type),
        Family(
            "granite",
            PRE_NORM,
            embedding_multiplier="embedding_multiplier",
            residual_multiplier="residual_multiplier",
            logits_divisor="logits_scaling",
        ),
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
        raise UnsupportedModelError(_not_in_the_table(config))
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError("use_bidirectional_attention is set; only causal models can be decoded")
    for rope_type in _rope_types(config):
        if rope_type in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"rope type '{rope_type}' changes its frequencies as the text grows, so verifying several tokens in "
                "one pass would not give the tokens of plain decoding; use a model with a fixed rope type"
            )
    return family


def setting(config: PreTrainedConfig, name: str | None) -> float:
    """The number that a configuration gives for a multiplier or divisor; 1 where the family has none."""
    return 1.0 if name is None else float(getattr(config, name))


def _not_in_the_table(config: PreTrainedConfig) -> str:
    text = getattr(config, "text_config", None)
    if text is not None and text.model_type in FAMILIES:
        return (
            f"model type '{config.model_type}' is multimodal and not supported, but its text model "
            f"('{text.model_type}') is; save that as a model of its own, as docs/families.md shows"
        )
    return f"model type '{config.model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}"


def _rope_types(config: PreTrainedConfig) -> list[str]:
    """One for each layer type that has rotary embeddings of its own, or one for all."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [rope for rope in parameters.values() if isinstance(rope, dict)]
    return [rope.get("rope_type", "default") for rope in by_layer_type or [parameters]]
