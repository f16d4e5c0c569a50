"""How long and how thoroughly to search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerskip.errors import InvalidInputError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

# Names of samplers; search.samplers makes them.
SAMPLERS = ("tpe", "greybox")
# Optuna's samplers take seeds below this.
SEEDS = 2**32


@dataclass(frozen=True)
class SearchSettings:
    """How long and how thoroughly to search.

    Args:
        trials: Candidates that are evaluated when the search ends.
        timeout: Seconds after which no new trial starts; None for no limit. Finalists are measured afterwards.
        max_new_tokens: Tokens to generate for each prompt.
        prompts_per_trial: Prompts that a measured candidate decodes; a hopeless one stops earlier.
        finalists: Best candidates to measure on held-out prompts.
        held_out_prompts: Most held-out prompts to measure each finalist on.
        measuring_share: Most of the search's time that may go into decoding promising candidates, from 0 to 1; above 0
            one is measured in any case.
        sampler: What proposes candidates: one of ``SAMPLERS``, or any sampler of Optuna's.
        workers: Processes of this machine that work on the study together.
        seed: Makes the proposals repeatable (measured speeds never are).

    Raises:
        InvalidInputError: A number is out of its range, or there is no such sampler.
    """

    trials: int = 200
    timeout: float | None = None
    max_new_tokens: int = 48
    prompts_per_trial: int = 6
    finalists: int = 3
    held_out_prompts: int = 16
    measuring_share: float = 0.7
    sampler: str | BaseSampler = "tpe"
    workers: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "max_new_tokens", "prompts_per_trial", "finalists", "held_out_prompts", "workers"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidInputError(f"timeout: expected a number of seconds above 0, got {self.timeout}")
        if not 0 <= self.measuring_share <= 1:
            raise InvalidInputError(f"measuring_share: expected a number from 0 to 1, got {self.measuring_share}")
        if isinstance(self.sampler, str) and self.sampler not in SAMPLERS:
            raise InvalidInputError(f"sampler '{self.sampler}' is unknown; expected {', '.join(SAMPLERS)}")
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise InvalidInputError(f"seed: expected a whole number from 0 to {SEEDS - 1}, got {self.seed}")

    @property
    def sampler_name(self) -> str:
        """Name of the sampler."""
        return self.sampler if isinstance(self.sampler, str) else type(self.sampler).__name__
