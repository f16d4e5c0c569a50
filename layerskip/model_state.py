"""What a model computes with, besides the code of its classes: settings, modules, hooks, adapters and weights.

layerskip calls the parts of a model, not the model. So what is attached to a layer as a whole would be ignored. And
what was worked out from a model once (a wrapper, packed or captured passes, keys and values) is wrong after it was
changed. Both are looked at before every generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import chain
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from layerskip.errors import UnsupportedModelError
from layerskip.shared_copies import is_patched

# Settings that change what a model computes. Listed by name, because a newer transformers adds settings with harmless
# defaults to every configuration; a test holds the list against the settings of every family.
COMPUTING_SETTINGS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
# Settings of families that were added later: left out where a configuration lacks them, so that the fingerprints of
# other families stay the same.
SETTINGS_OF_SOME = (
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "no_rope_layers",
    "residual_multiplier",
)
# What accelerate attaches to bring inputs to a module's device.
_MOVING_INPUTS = "AlignDevicesHook"
# Where transformers has the hooks by which it returns hidden states; once made, they stay, and do nothing.
_CAPTURING = "transformers.utils.output_capturing"
# What torch.compile makes of a module.
_COMPILED = "OptimizedModule"


@dataclass(frozen=True)
class ModelState:
    """What a model computes with at a moment; equal if nothing was changed.

    Args:
        settings: Values of its configuration.
        modules: Ids of its modules.
        hooks: Numbers of hooks, and ids of replaced forwards.
        adapters: Which adapters are active, and how they count.
        weights: Ids, versions, places and types of its weights.
    """

    settings: str
    modules: tuple[int, ...]
    hooks: tuple[int, ...]
    adapters: tuple[str, ...]
    weights: tuple[object, ...]

    def differs_in(self, other: ModelState, *, but: str | None = None) -> str | None:
        """What was changed between two states, for people; None if nothing was. ``but`` names a field to leave out."""
        for field in fields(self):
            if field.name != but and getattr(self, field.name) != getattr(other, field.name):
                return field.name
        return None


class ModelStateReader:
    """Reads the state of a model, quickly and often.

    Args:
        model: The model, or a weak proxy of it, which is not kept alive then.

    Attributes:
        modules: Ids of the modules that it knows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        below = list(model.modules())[1:]  # the first is the model itself
        self._own = [vars(module) for module in below]
        self._children = [module._modules for module in below if module._modules]
        self._hooks = [hooks for module in below for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self._parameters = [module._parameters for module in below if module._parameters]
        self._adapted = [module for module in below if adapter_state(module)]
        self.modules = self.read().modules

    def read(self) -> ModelState:
        """The state now, but for modules that were added since the reader was made."""
        model = self._model
        weights = [w for w in chain.from_iterable(map(dict.values, self._parameters)) if w is not None]
        children = (model._modules, *self._children)
        hooks = (model._forward_pre_hooks, model._forward_hooks, *self._hooks)
        forwards = (id(own["forward"]) for own in (vars(model), *self._own) if "forward" in own)
        return ModelState(
            settings=settings_text(model.config),
            modules=tuple(map(id, chain.from_iterable(map(dict.values, children)))),
            hooks=tuple(chain(chain.from_iterable(_own_hooks(part) for part in hooks if part), forwards)),
            adapters=tuple(repr(adapter_state(module)) for module in self._adapted),
            weights=tuple(map(_weight_state, weights)),
        )


_PLACE = attrgetter("device", "dtype")


def _weight_state(weight: Tensor) -> object:
    # Inference tensors cannot be changed in place outside of inference mode, and count no versions.
    version = 0 if weight.is_inference() else weight._version
    # Moving a model, and back, keeps all else; a quantized weight has no memory of its own.
    memory = weight.data_ptr() if type(weight) in (nn.Parameter, Tensor) else 0
    return id(weight), version, memory, *_PLACE(weight)


def _own_hooks(hooks: Mapping[int, Any]) -> Iterator[int]:
    """The numbers of a module's hooks, which are never used again, but for those that transformers leaves behind."""
    return (number for number, hook in hooks.items() if getattr(hook, "__module__", None) != _CAPTURING)


def computing_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a configuration that change what a model computes."""
    settings = {name: getattr(config, name, None) for name in COMPUTING_SETTINGS}
    return settings | {name: getattr(config, name) for name in SETTINGS_OF_SOME if hasattr(config, name)}


def settings_text(config: PreTrainedConfig) -> str:
    """The same, and how attention is computed, to be compared."""
    return f"{computing_settings(config)} {config._attn_implementation}"


def adapter_state(module: nn.Module) -> Mapping[str, object]:
    """What a PEFT module computes with besides its weights: the active adapters and their scaling."""
    active = getattr(module, "active_adapters", None)
    if active is None or isinstance(module, PreTrainedModel):  # transformers' models have methods of these names
        return {}
    state = {name: getattr(module, name) for name in ("disable_adapters", "merged_adapters") if hasattr(module, name)}
    return state | {"active": active, "scaling": getattr(module, "scaling", None)}


def check_in_memory(model: PreTrainedModel) -> None:
    """Make sure that accelerate has not offloaded weights of a model.

    Raises:
        UnsupportedModelError: Some are offloaded. The message names the first.
    """
    moved = any("_hf_hook" in vars(module) for module in model.modules())
    for name, weight in model.named_parameters():
        if moved and weight.is_meta:
            raise UnsupportedModelError(
                f"{name}: is offloaded, so that it is not there when parts of its layer are called; load the whole "
                "model into memory"
            )


def check_honoured(model: PreTrainedModel) -> None:
    """Make sure that nothing is attached to a model that only a call of a layer, or of the model, would run.

    Raises:
        UnsupportedModelError: A layer, the decoder or the model has a hook, a forward of its own or a wrapper. The
            message names the module.
    """
    for name, module in _called_by_transformers_alone(model):
        what = _attached(module)
        if what is not None:
            raise UnsupportedModelError(
                f"{name}: has {what}, which would not run, because layerskip calls its parts and not the module; "
                "remove it, or use profile.as_assistant(model) with transformers' generate"
            )


def _called_by_transformers_alone(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    decoder: Any = model.base_model
    yield "the model", model
    yield model.base_model_prefix, decoder
    for number, layer in enumerate(decoder.layers):
        yield f"{model.base_model_prefix}.layers.{number}", layer


def runs_as_its_class(module: nn.Module) -> bool:
    """Whether calling a module runs what its class does and nothing else: no hooks, and no forward of its own."""
    hooks = (module._forward_pre_hooks, module._forward_hooks)
    return not any(True for own in hooks for _ in _own_hooks(own)) and not is_patched(module)


def _attached(module: nn.Module) -> str | None:
    """What would be ignored if a module's parts were called in its place; None if nothing would."""
    if any(True for hooks in (module._forward_pre_hooks, module._forward_hooks) if hooks for _ in _own_hooks(hooks)):
        return "a forward hook"
    if module.__class__.__name__ == _COMPILED:
        return _attached(cast(nn.Module, module._orig_mod))
    own: Mapping[str, Any] = vars(module)
    kind = module.__class__  # of a weak proxy, what it stands for
    hook = own.get("_hf_hook")
    if hook is not None and any(type(part).__name__ != _MOVING_INPUTS for part in getattr(hook, "hooks", [hook])):
        return f"a hook of accelerate ({type(hook).__name__})"
    forward = own.get("forward") if hook is None else own.get("_old_forward")
    # torch.compile changes nothing but the speed.
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if forward is not None and getattr(forward, "__func__", None) is not kind.forward:
        return "a forward of its own"
    if not isinstance(module, PreTrainedModel) and not _is_of_transformers(kind):
        return f"a class of its own ({kind.__name__})"
    return None


def _is_of_transformers(kind: type[nn.Module]) -> bool:
    """Whether a layer's class is transformers' own, or one that a checkpoint brought along."""
    return kind.forward.__module__.partition(".")[0].startswith("transformers")
