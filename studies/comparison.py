"""A comparison of decoding methods on one machine: their figures, and which method to use there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from layerskip.utils import duration
from studies.categories import CategoryFigures, QuestionTimes, by_category
from studies.statistics import (
    FEW_PROMPTS,
    FEWEST_PROMPTS,
    NOTHING_FASTER,
    Speedup,
    describe_disturbed,
    speedup_of_prompt,
)

TRANSFORMERS_PLAIN = "transformers plain"


@dataclass(frozen=True)
class Entry:
    """The figures of one decoding method.

    Args:
        name: What it is called.
        tokens_per_second: By the fastest repeat of each prompt, prefill included.
        lowest: The slowest repeat's.
        highest: The fastest repeat's.
        speedup: Against layerskip's plain decoding; the interval is over prompts.
        prompts: The times of each prompt, those of its fastest repeats.
        acceptance_rate: α, accepted ÷ drafted; None if nothing was drafted.
        tokens_per_pass: τ, new tokens ÷ passes of the target model, the prompt's among them.
        draft_cost: c, the time to draft one token, in plain steps; None if nothing was drafted.
        draft_share: The part of its time that went into drafting, from 0 to 1.
        draft_bytes: Extra memory of its draft.
        peak_bytes: Most device memory in use while it decoded, above what the models take; None except on CUDA.
        training_seconds: How long its draft was trained, if that is known.
        near_ties: Prompts whose output diverges from plain decoding's at a near-tie of the top two tokens.
        different: Prompts whose output diverges from it anywhere else.
        disturbed: Prompts whose times are uncertain, because the machine was busy.
    """

    name: str
    tokens_per_second: float
    lowest: float
    highest: float
    speedup: Speedup
    prompts: Sequence[QuestionTimes]
    acceptance_rate: float | None
    tokens_per_pass: float
    draft_cost: float | None
    draft_share: float
    draft_bytes: int
    peak_bytes: int | None
    training_seconds: float | None
    near_ties: int
    different: int
    disturbed: int = 0

    @property
    def pays(self) -> bool:
        """Whether it was shown to be faster than plain decoding with the same output; few prompts show nothing."""
        return len(self.prompts) >= FEWEST_PROMPTS and self.speedup.low > 1 and not self.different


@dataclass(frozen=True)
class MemoryLimit:
    """The speed of plain decoding if nothing took time but reading the weights.

    Args:
        step_bytes: Weights that a plain step reads.
        bandwidth: Bytes a second that the device reads from its memory.
    """

    step_bytes: int
    bandwidth: float

    @property
    def tokens_per_second(self) -> float:
        """The most that plain decoding can reach."""
        return self.bandwidth / self.step_bytes


@dataclass(frozen=True)
class Comparison:
    """Decoding methods measured on the same prompts with one model, in one run.

    Args:
        model: Where the model comes from.
        device: What it ran on.
        dtype: Its floating-point type.
        engine: The engine of layerskip's passes.
        versions: Versions of the libraries, by name.
        repeats: How often each method decoded each prompt.
        max_new_tokens: Most tokens for each prompt.
        entries: The figures of all methods; layerskip's plain decoding is the first.
        left_out: Why other methods could not take part, by name.
        memory: What reading the weights limits plain decoding to, if that was measured.
        categories: The category of each prompt by its id, where they are questions of a suite.
    """

    model: str
    device: str
    dtype: str
    engine: str
    versions: Mapping[str, str]
    repeats: int
    max_new_tokens: int
    entries: Sequence[Entry]
    left_out: Mapping[str, str]
    memory: MemoryLimit | None = None
    categories: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Entry | None:
        """The fastest method that was shown to be faster than plain decoding; None if none was."""
        return max((e for e in self.entries if e.pays), key=lambda entry: entry.speedup.value, default=None)

    @property
    def prompts(self) -> int:
        """How many prompts were decoded."""
        return len(self.entries[0].prompts)

    @cached_property
    def by_category(self) -> Mapping[str, Sequence[CategoryFigures]]:
        """The figures of each method by category, by the method's name; none outside of suites."""
        return {
            entry.name: by_category(entry.prompts, self.categories) if self.categories else [] for entry in self.entries
        }

    def over_transformers(self, entry: Entry) -> float | None:
        """A method's tokens/s ÷ those of transformers' plain decoding; None if that did not take part."""
        theirs = next((other for other in self.entries if other.name == TRANSFORMERS_PLAIN), None)
        return None if theirs is None else entry.tokens_per_second / theirs.tokens_per_second

    def share_of_bandwidth(self, entry: Entry) -> float | None:
        """The share of what the device can read that a plain decoding reads of weights; None for other methods."""
        is_plain = entry.acceptance_rate is None and entry.tokens_per_pass == 1
        return entry.tokens_per_second / self.memory.tokens_per_second if self.memory and is_plain else None


def advice(comparison: Comparison) -> str:
    """Which method to use on that machine, in one sentence."""
    best = comparison.best
    if best is not None:
        speedup = best.speedup
        interval = f"95 %: {speedup.low:.2f} to {speedup.high:.2f}"
        return f"Use {best.name} here: {speedup.value:.2f}× the speed of plain decoding ({interval})."
    if comparison.prompts < FEWEST_PROMPTS:
        return FEW_PROMPTS
    return f"Use plain decoding here: {NOTHING_FASTER}."


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """The conditions of a comparison, as (name, value)."""
    times = f"{comparison.repeats} times" if comparison.repeats > 1 else "once"
    decoded = f"{comparison.prompts} of at most {comparison.max_new_tokens} tokens"
    disturbed = max((entry.disturbed for entry in comparison.entries), default=0)
    memory = comparison.memory
    return [
        ("model", comparison.model),
        ("machine", f"{comparison.device}, {comparison.dtype}, {comparison.engine} engine"),
        ("versions", ", ".join(f"{name} {version}" for name, version in comparison.versions.items())),
        ("prompts", f"{decoded}, each at least {times}, interleaved"),
        *[("bandwidth", _describe(limit)) for limit in [memory] if limit is not None],
        *[("uncertain", describe_disturbed(disturbed, comparison.prompts))] * (disturbed > 0),
    ]


def _describe(memory: MemoryLimit) -> str:
    return (
        f"the device reads {memory.bandwidth / 1e9:.1f} GB/s, a plain step {memory.step_bytes / 1e6:,.0f} MB of "
        f"weights: at most {memory.tokens_per_second:.1f} tokens/s"
    )


def described(comparison: Comparison) -> dict[str, Any]:
    """A comparison as values for JSON."""
    best = comparison.best
    names = ("model", "device", "dtype", "engine", "prompts", "repeats", "max_new_tokens")
    return {
        **{name: getattr(comparison, name) for name in names},
        "versions": dict(comparison.versions),
        "memory": None if comparison.memory is None else asdict(comparison.memory),
        "entries": [
            _described(entry)
            | {
                "categories": [each.described() for each in comparison.by_category[entry.name]],
                "over_transformers": comparison.over_transformers(entry),
                "share_of_bandwidth": comparison.share_of_bandwidth(entry),
            }
            for entry in comparison.entries
        ],
        "left_out": dict(comparison.left_out),
        "best": None if best is None else best.name,
        "advice": advice(comparison),
    }


def _described(entry: Entry) -> dict[str, Any]:
    values = {each.name: getattr(entry, each.name) for each in fields(entry)}
    prompts, speedup = values.pop("prompts"), values.pop("speedup")
    return {
        **values,
        "speedup": speedup.value,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "prompt_speedups": {prompt.prompt: speedup_of_prompt(prompt) for prompt in prompts},
        "pays": entry.pays,
    }


# The columns of the table, and what they mean.
COLUMNS: Mapping[str, str] = {
    "tokens/s": "by the fastest repeat of each prompt, prefill included",
    "whole repeats": "tokens/s of the slowest and of the fastest repeat as a whole",
    "speedup": "against layerskip's plain decoding",
    "95 %": "the speedup's interval, from resampling prompts",
    "÷ transformers": "tokens/s against those of transformers' plain decoding",
    "bandwidth": "weights that plain decoding reads, as a share of what the device can read meanwhile",
    "α": "accepted ÷ drafted tokens",
    "τ": "new tokens for each pass of the target model",
    "c": "time to draft a token, in plain steps",
    "drafting": "share of the time spent drafting",
    "memory": "extra memory of the draft",
    "peak": "peak device memory above the models'",
    "training": "time spent training the draft",
    "output": "compared with plain decoding",
}


def table(comparison: Comparison) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """All figures, as text: the names of the columns, and a row of cells for each entry; empty columns are left out."""
    rows = [{"": entry.name} | _cells(entry) | _shared_cells(comparison, entry) for entry in comparison.entries]
    columns = ("", *(column for column in COLUMNS if any(row[column] for row in rows)))
    return columns, [[row[column] for column in columns] for row in rows]


def _cells(entry: Entry) -> dict[str, str]:
    has_interval = entry.speedup.low < entry.speedup.high
    return {
        "tokens/s": f"{entry.tokens_per_second:.1f}",
        "whole repeats": f"{entry.lowest:.1f} to {entry.highest:.1f}" if entry.lowest < entry.highest else "",
        "speedup": f"{entry.speedup.value:.2f}×",
        "95 %": f"{entry.speedup.low:.2f} to {entry.speedup.high:.2f}" if has_interval else "",
        "α": "" if entry.acceptance_rate is None else f"{entry.acceptance_rate:.0%}",
        "τ": f"{entry.tokens_per_pass:.2f}",
        "c": "" if entry.draft_cost is None else f"{entry.draft_cost:.2f}",
        "drafting": f"{entry.draft_share:.0%}" if entry.draft_cost is not None else "",
        "memory": _mebibytes(entry.draft_bytes) if entry.draft_bytes else "",
        "peak": "" if entry.peak_bytes is None else _mebibytes(entry.peak_bytes),
        "training": "" if entry.training_seconds is None else duration(entry.training_seconds),
        "output": _output(entry),
    }


def category_table(comparison: Comparison) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """The speedup of each method on each category, as text: the names of the columns, and a row for each method."""
    figures = comparison.by_category
    columns = ("", *(each.category for each in next(iter(figures.values()))))
    return columns, [[name, *(f"{each.speedup.value:.2f}×" for each in own)] for name, own in figures.items()]


def _shared_cells(comparison: Comparison, entry: Entry) -> dict[str, str]:
    """Cells that depend on more than the entry."""
    ratio, share = comparison.over_transformers(entry), comparison.share_of_bandwidth(entry)
    return {
        "÷ transformers": "" if ratio is None else f"{ratio:.2f}×",
        "bandwidth": "" if share is None else f"{share:.0%}",
    }


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _output(entry: Entry) -> str:
    parts = [f"{entry.different} differ"] * (entry.different > 0)
    parts += [f"{entry.near_ties} at near-ties"] * (entry.near_ties > 0)
    return ", ".join(parts) or "same"
