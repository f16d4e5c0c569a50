"""The tensors of a draft, beside its profile: bridges and draft vocabulary, as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from layerskip.drafts.bridges import Bridge


@dataclass(frozen=True, eq=False)
class DraftAssets:
    """What a draft needs besides the model's own weights.

    Args:
        bridges: By the index of their first sublayer.
        token_ids: ``[n]``, the draft vocabulary, ascending; None for the whole one.
    """

    bridges: Mapping[int, Bridge] = field(default_factory=dict)
    token_ids: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self.bridges) or self.token_ids is not None

    def to_bytes(self) -> bytes:
        """The content of a safetensors file."""
        tensors = {} if self.token_ids is None else {"token_ids": self.token_ids.to(torch.int32)}
        for bridge in self.bridges.values():
            name = f"bridge.{bridge.start}.{bridge.stop}"
            tensors[f"{name}.bias"] = bridge.bias
            tensors |= {f"{name}.factor.{number}": factor for number, factor in enumerate(bridge.factors)}
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> DraftAssets:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: The content is something else.
        """
        try:
            tensors = load(content)
            token_ids = tensors.pop("token_ids", None)
            ends = {tuple(int(part) for part in name.split(".")[1:3]) for name in tensors}
            bridges = {start: _bridge(tensors, start, stop) for start, stop in sorted(ends)}
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"not the tensors of a draft: {error}") from error
        return cls(bridges, None if token_ids is None else token_ids.long())

    def to(self, like: Tensor) -> DraftAssets:
        """The assets on the device of a tensor, the bridges in its dtype."""
        bridges = {start: bridge.to(like) for start, bridge in self.bridges.items()}
        return DraftAssets(bridges, None if self.token_ids is None else self.token_ids.to(like.device))


def _bridge(tensors: Mapping[str, Tensor], start: int, stop: int) -> Bridge:
    name = f"bridge.{start}.{stop}"
    factors = sorted(key for key in tensors if key.startswith(f"{name}.factor."))
    return Bridge(start, stop, tuple(tensors[key] for key in factors), tensors[f"{name}.bias"])
