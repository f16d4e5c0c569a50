"""PEFT adapters: which of them a model may have."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from layerskip.errors import UnsupportedModelError

# Kinds of adapters that act outside of the modules that they replace, by PEFT's names.
_ACTING_ELSEWHERE = ("ADAPTION_PROMPT", "POLY", "XLORA")


def adapted_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT model, its adapters in place; any other model as it is.

    An adapter that replaces modules, as LoRA does, is called in their place, so that nothing else needs to know of it.
    An adapter that does more, such as a learned prompt before the text, would silently have no effect.

    Raises:
        UnsupportedModelError: An adapter does more than to replace modules.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        _check_adapter(config)
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return cast(PreTrainedModel, model)
    return cast(Any, model).get_base_model()  # type: ignore[no-any-return]


def check_generating(model: nn.Module) -> None:
    """Make sure that the model is not generating for a PEFT model whose adapter does more than to replace modules.

    While it generates, a PEFT model puts a method of its own into the model inside it, which has no other reference to
    the PEFT model.

    Raises:
        UnsupportedModelError: It is.
    """
    around = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    if isinstance(around, nn.Module):
        adapted_model(around)


def _check_adapter(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(config, "alora_invocation_tokens", None) is not None:
        kind = "activated LoRA"  # active only after certain tokens of the prompt
    elif not config.is_prompt_learning and kind not in _ACTING_ELSEWHERE:
        return
    raise UnsupportedModelError(
        f"adapter: {kind} does more than to replace modules, so it is not supported; use LoRA or another kind that "
        "does only that"
    )
