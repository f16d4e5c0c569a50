"""Models wrapped once and drafters made once, kept for as long as the model lives and stays as it is.

Checking a profile against a model reads every weight, and making a draft gathers rows of the head: too much for every
call of ``model.generate``. What is kept refers to the model itself weakly, so that it does not keep its memory.
"""

from __future__ import annotations

import copy
import threading
import weakref
from dataclasses import dataclass, field
from typing import cast

from transformers import PreTrainedModel

from layerskip.decoding.drafting import Drafter
from layerskip.engine import EagerEngine
from layerskip.errors import InvalidInputError
from layerskip.profile import DraftProfile
from layerskip.stack.model import LayerSkipModel

# Drafts kept for one model, those used last: each may hold rows of the head.
_DRAFTERS_KEPT = 4


@dataclass
class _Wrapped:
    """A wrapper, the state that the model was wrapped in, and the drafters made for it, the newest last."""

    wrapper: LayerSkipModel
    state: object
    drafters: list[tuple[DraftProfile, Drafter]] = field(default_factory=list)


_WRAPPED: weakref.WeakKeyDictionary[PreTrainedModel, _Wrapped] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def wrapper_of(model: PreTrainedModel) -> LayerSkipModel:
    """The model's wrapper: the same for every call, until the model is moved, changed or dropped.

    It does not keep the model alive; keep the model for as long as you use it.

    Raises:
        UnsupportedModelError: The model cannot be taken apart.
        InvalidInputError: The model is in training mode.
    """
    return _wrapped(model).wrapper


def drafter_of(profile: DraftProfile, model: PreTrainedModel) -> Drafter:
    """A drafter for one generation; what is costly about it is made and checked once for a profile and a model.

    Raises:
        InvalidProfileError: The profile is for another model.
    """
    with _LOCK:
        wrapped = _wrapped(model)
        kept = next((entry for entry in wrapped.drafters if entry[0] == profile), None)
        if kept is None:
            kept = profile, profile.drafter(wrapped.wrapper)
        wrapped.drafters = [*(entry for entry in wrapped.drafters if entry is not kept), kept][-_DRAFTERS_KEPT:]
        return copy.copy(kept[1])  # its own state, for generations at the same time


def _wrapped(model: PreTrainedModel) -> _Wrapped:
    if model.training:
        raise InvalidInputError("the model is in training mode; call model.eval() first")
    state = _state(model)
    with _LOCK:
        wrapped = _WRAPPED.get(model)
        if wrapped is None or wrapped.state != state:
            wrapped = _WRAPPED[model] = _Wrapped(_wrap(model), state)
        return wrapped


def _wrap(model: PreTrainedModel) -> LayerSkipModel:
    wrapper = LayerSkipModel(cast(PreTrainedModel, weakref.proxy(model)))
    # Its own engine would make a cycle with it, and the model's memory would wait for the garbage collector.
    wrapper.engine = EagerEngine(cast(LayerSkipModel, weakref.proxy(wrapper)))
    return wrapper


def _state(model: PreTrainedModel) -> object:
    """Changes when the model is moved, converted, adapted or trained, or computes attention another way."""
    weights = tuple(
        (id(weight), weight.device, weight.dtype, 0 if weight.is_inference() else weight._version)
        for weight in model.parameters()
    )
    return model.config._attn_implementation, weights
