"""Copies of modules that share their parts with the original."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def shared_copy(module: Module) -> Module:
    """A module of the same class over the same parts, whose parts can be exchanged without a change to the original.

    What accelerate attaches to move inputs between devices stays with the original.
    """
    twin = type(module).__new__(type(module))
    for name, value in vars(module).items():
        vars(twin)[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    # Those refer to the original: of module.compile(), and of accelerate.
    for name in ("_compiled_call_impl", "forward", "_old_forward", "_hf_hook"):
        vars(twin).pop(name, None)
    return twin


def is_patched(module: nn.Module) -> bool:
    """Whether a module runs something else than its class does, which a copy of it would not run."""
    own = vars(module)
    forward = own.get("_old_forward", own.get("forward")) if "_hf_hook" in own else own.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
