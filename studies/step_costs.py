"""What the parts of a step cost on a study's machine, in units of one plain decoding step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerskip.engine import PassCosts


@dataclass(frozen=True)
class RelativeParts:
    """Costs behind a text of some length, in units of one plain decoding step.

    Args:
        context: Length of the text in tokens.
        plain_seconds: Of one plain decoding step.
        attention: Of one attention sublayer in a draft step.
        mlp: Of one MLP sublayer.
        bridge: Of one bridge.
        head: Of the final norm and the head, by the size of the draft vocabulary; 0 is the whole one.
        fixed: Of everything else.
        verification: Of passes of the target model, by the number of tokens in them; only widths that pay are measured.
    """

    context: float
    plain_seconds: float
    attention: float
    mlp: float
    bridge: float
    head: Mapping[int, float]
    fixed: float
    verification: Mapping[int, float]

    def verifying(self, tokens: int) -> float:
        """v: what a pass over so many tokens costs, at the cheapest measured width that has room for them."""
        wide_enough = [cost for width, cost in self.verification.items() if width >= tokens]
        return min(wide_enough, default=self.verification[max(self.verification)])


def read_parts(latency: str | None) -> RelativeParts | None:
    """Costs halfway between the two text lengths at which a search measured them.

    Args:
        latency: What the search kept with its study, the JSON of its latency model; None if it kept nothing.

    Returns:
        None where it kept nothing, or another form.
    """
    try:
        near, far = (json.loads(latency or "")[length] for length in ("short", "long"))
        return _halfway(near, far)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _halfway(near: dict[str, Any], far: dict[str, Any]) -> RelativeParts:
    passes = [
        PassCosts(*({int(k): s for k, s in one["passes"][part].items()} for part in _PASSES)) for one in (near, far)
    ]
    plain = _mean(*(one.seconds(1) for one in passes))

    def share(part: str) -> float:
        return _mean(near["step"][part], far["step"][part]) / plain

    return RelativeParts(
        context=_mean(near["context"], far["context"]),
        plain_seconds=plain,
        attention=share("attention"),
        mlp=share("mlp"),
        bridge=share("bridge"),
        head={
            int(size): _mean(seconds, far["step"]["head"][size]) / plain
            for size, seconds in near["step"]["head"].items()
        },
        fixed=share("fixed"),
        verification={
            width: _mean(*(one.seconds(width) for one in passes)) / plain for width in sorted(passes[0].sublayers)
        },
    )


_PASSES = ("sublayers", "head")


def _mean(near: float, far: float) -> float:
    return (near + far) / 2
