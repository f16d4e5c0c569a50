"""When a draft stops proposing.

Every rule is a largest draft length and a threshold on the draft's confidence, the highest probability that it gives
any token where it has just proposed one: drafting continues while the confidence is at least the threshold. The token
proposed there still is. Sampling stays exact because whether a token is proposed does not depend on which token it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerskip.checks import fraction, whole_number
from layerskip.errors import InvalidInputError


def _check_length(rule: object, name: str) -> None:
    value = whole_number(name, getattr(rule, name))
    object.__setattr__(rule, name, value)
    if value < 1:
        raise InvalidInputError(f"{name}: expected at least 1, got {value}")


def _check_fraction(rule: object, name: str) -> None:
    object.__setattr__(rule, name, fraction(name, getattr(rule, name)))


def _tokens(number: int) -> str:
    return "1 token" if number == 1 else f"{number} tokens"


class StoppingState:
    """One generation's state of a stopping rule: the threshold in force.

    Args:
        max_length: Most tokens in one draft.
        threshold: Lowest confidence with which drafting continues; 0 never stops early.
    """

    def __init__(self, max_length: int, threshold: float) -> None:
        self.max_length = max_length
        self.threshold = threshold

    @property
    def reads_confidence(self) -> bool:
        """Whether confidences matter at all; reading one makes the host wait for the device."""
        return self.threshold > 0

    def stops_after(self, confidence: float) -> bool:
        """Whether a draft ends with the token that was proposed with this confidence."""
        return confidence < self.threshold

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn how a round went: of ``drafted`` proposed tokens (at least one) ``accepted`` were accepted."""


@dataclass(frozen=True)
class FixedLength:
    """Always propose ``length`` tokens.

    Args:
        length: Tokens in a draft, at least 1.
        kind: Names the rule in a profile.

    Raises:
        InvalidInputError: The length is below 1.
    """

    length: int = 4
    kind: Literal["fixed"] = "fixed"
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how DraftProfile reads it from JSON

    def __post_init__(self) -> None:
        _check_length(self, "length")

    def new_state(self) -> StoppingState:
        """A fresh state for one generation."""
        return StoppingState(self.length, threshold=0.0)

    def __str__(self) -> str:
        return _tokens(self.length)


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Stop where the draft's highest probability is below ``threshold``, or after ``max_length`` tokens.

    Args:
        threshold: Lowest confidence with which drafting continues, from 0 to 1.
        max_length: Most tokens in a draft, at least 1.
        kind: Names the rule in a profile.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    threshold: float = 0.6
    max_length: int = 8
    kind: Literal["confidence"] = "confidence"
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how DraftProfile reads it from JSON

    def __post_init__(self) -> None:
        _check_fraction(self, "threshold")
        _check_length(self, "max_length")

    def new_state(self) -> StoppingState:
        """A fresh state for one generation."""
        return StoppingState(self.max_length, self.threshold)

    def __str__(self) -> str:
        return f"confidence below {self.threshold:g}, at most {_tokens(self.max_length)}"


@dataclass(frozen=True)
class AdaptiveThreshold:
    """A confidence threshold that follows the acceptance rate, as in Draft & Verify.

    After each round the running acceptance rate ``r <- rate_momentum * r + (1 - rate_momentum) * accepted / drafted``
    is compared with ``target_rate``. Below it the threshold should rise by ``step``; otherwise it should fall by
    ``step``, unless the draft ran to ``max_length``, where it stays. The threshold moves towards that value:
    ``t <- threshold_momentum * t + (1 - threshold_momentum) * wanted``.

    Source: Zhang et al., "Draft & Verify", ACL 2024 (arXiv 2309.08168), section 3.3. The defaults are those of the
    authors' ``decoding.py``: ``th_stop_draft=0.8``, ``max_step_draft=8``, ``auto_parameters=[1, 0.5, 0.9, 1e-2, 0.9]``.

    Args:
        initial_threshold: Lowest confidence with which the first draft continues, from 0 to 1.
        max_length: Most tokens in a draft, at least 1.
        target_rate: The acceptance rate to keep to, from 0 to 1.
        step: How far the threshold should move after a round, from 0 to 1.
        rate_momentum: Weight of earlier rounds in the running acceptance rate, from 0 to 1.
        threshold_momentum: Weight of the threshold before a round in the one after it, from 0 to 1.
        kind: Names the rule in a profile.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    initial_threshold: float = 0.8
    max_length: int = 8
    target_rate: float = 0.9
    step: float = 0.01
    rate_momentum: float = 0.5
    threshold_momentum: float = 0.9
    kind: Literal["adaptive"] = "adaptive"
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}  # how DraftProfile reads it from JSON

    def __post_init__(self) -> None:
        _check_length(self, "max_length")
        for name in ("initial_threshold", "target_rate", "step", "rate_momentum", "threshold_momentum"):
            _check_fraction(self, name)

    def new_state(self) -> StoppingState:
        """A fresh state for one generation."""
        return _AdaptiveController(self)

    def __str__(self) -> str:
        return f"adaptive confidence from {self.initial_threshold:g}, at most {_tokens(self.max_length)}"


class _AdaptiveController(StoppingState):
    def __init__(self, rule: AdaptiveThreshold) -> None:
        super().__init__(rule.max_length, rule.initial_threshold)
        self._rule = rule
        self._rate = 0.0

    @property
    def reads_confidence(self) -> bool:
        return True

    def observe(self, drafted: int, accepted: int) -> None:
        rule = self._rule
        self._rate = rule.rate_momentum * self._rate + (1 - rule.rate_momentum) * accepted / drafted
        if self._rate < rule.target_rate:
            wanted = self.threshold + rule.step
        elif drafted == rule.max_length:
            wanted = self.threshold
        else:
            wanted = self.threshold - rule.step
        self.threshold = rule.threshold_momentum * self.threshold + (1 - rule.threshold_momentum) * wanted


DraftStopping = FixedLength | ConfidenceThreshold | AdaptiveThreshold
"""When a draft ends: one of the three rules."""
