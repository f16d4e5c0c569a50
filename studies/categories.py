"""Figures by category of a standard suite, in the field's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from studies.statistics import PromptTimes, Speedup, speedup_of_all

# The row of all categories together.
ALL = "all categories"


class QuestionTimes(PromptTimes, Protocol):
    """One question decoded by plain decoding and another method."""

    @property
    def target_passes(self) -> int:
        """Passes of the target model by the other method, the prompts' among them."""


@dataclass(frozen=True)
class CategoryFigures:
    """What a method did on the questions of one category.

    Args:
        category: Its name.
        questions: How many.
        speedup: Against our plain decoding; the interval is over questions.
        tokens_per_second: Prefill included.
        mean_accepted_length: τ, new tokens for each pass of the target model, the prompts' among them.
        acceptance_rate: α, accepted ÷ drafted tokens; None if nothing was drafted.
    """

    category: str
    questions: int
    speedup: Speedup
    tokens_per_second: float
    mean_accepted_length: float
    acceptance_rate: float | None

    @classmethod
    def of(cls, category: str, times: Sequence[QuestionTimes]) -> CategoryFigures:
        """The figures of some questions, at least one."""
        tokens, drafted = sum(t.draft_tokens for t in times), sum(t.drafted for t in times)
        return cls(
            category,
            len(times),
            speedup_of_all(times),
            tokens / sum(t.draft_seconds for t in times),
            tokens / sum(t.target_passes for t in times),
            sum(t.accepted for t in times) / drafted if drafted else None,
        )

    def described(self) -> dict[str, Any]:
        """As values for JSON."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """As a row of text, under :data:`COLUMNS`."""
        interval = f"{self.speedup.low:.2f} to {self.speedup.high:.2f}" if self.questions > 1 else ""
        rate = "" if self.acceptance_rate is None else f"{self.acceptance_rate:.0%}"
        figures = f"{self.speedup.value:.2f}×", interval, f"{self.tokens_per_second:.1f}"
        return self.category, str(self.questions), *figures, f"{self.mean_accepted_length:.2f}", rate


COLUMNS = ("category", "questions", "speedup", "95 %", "tokens/s", "τ", "α")


def by_category(times: Sequence[QuestionTimes], categories: Mapping[str, str]) -> list[CategoryFigures]:
    """A method's figures for each category, in the order of the suite, and for all together.

    Args:
        times: Of each question.
        categories: The category of each question, by its id.
    """
    groups: dict[str, list[QuestionTimes]] = {}
    for each in times:
        groups.setdefault(categories[each.prompt], []).append(each)
    figures = [CategoryFigures.of(category, group) for category, group in groups.items()]
    return [*figures, CategoryFigures.of(ALL, times)]
