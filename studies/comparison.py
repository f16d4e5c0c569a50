"""What several ways to decode came to on one machine, and which of them to use there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from studies.statistics import FEW_PROMPTS, FEWEST_PROMPTS, NOTHING_FASTER, DecodedBothWays, Speedup, speedup_of_prompt


class PromptTimes(DecodedBothWays, Protocol):
    """One prompt, decoded plainly and in another way."""

    @property
    def prompt(self) -> str:
        """The prompt's id."""

    @property
    def drafted(self) -> int:
        """Tokens proposed."""

    @property
    def accepted(self) -> int:
        """Proposed tokens that stood."""


@dataclass(frozen=True)
class Entry:
    """One way to decode.

    Args:
        name: What it is called.
        tokens_per_second: Median over the repeats, prefill included.
        lowest: The slowest repeat's.
        highest: The fastest repeat's.
        speedup: Against layerskip's plain decoding; the interval is over prompts.
        prompts: Each prompt, with the medians of its repeats.
        acceptance_rate: α, accepted ÷ drafted; None if nothing was drafted.
        tokens_per_pass: τ, new tokens ÷ passes of the target model, the prompt's among them.
        draft_cost: c, the time to draft one token, in plain steps; None if nothing was drafted.
        draft_share: The part of its time that went into drafting, from 0 to 1.
        draft_bytes: Memory that its draft takes beside the model.
        peak_bytes: Most device memory in use while it decoded, above what the models take; None except on CUDA.
        training_seconds: How long its draft was trained, if that is known.
        near_ties: Prompts whose output parts from plain decoding's where two best tokens are as good as tied.
        different: Prompts whose output parts from it anywhere else.
    """

    name: str
    tokens_per_second: float
    lowest: float
    highest: float
    speedup: Speedup
    prompts: Sequence[PromptTimes]
    acceptance_rate: float | None
    tokens_per_pass: float
    draft_cost: float | None
    draft_share: float
    draft_bytes: int
    peak_bytes: int | None
    training_seconds: float | None
    near_ties: int
    different: int

    @property
    def pays(self) -> bool:
        """Whether it was shown to be faster than plain decoding, and to say the same; few prompts show nothing."""
        return len(self.prompts) >= FEWEST_PROMPTS and self.speedup.low > 1 and not self.different


@dataclass(frozen=True)
class Comparison:
    """Several ways to decode the same prompts with one model, in one run.

    Args:
        model: Where the model comes from.
        device: What it ran on.
        dtype: Its floating-point type.
        engine: How layerskip's passes ran.
        versions: Of what it ran with, by name.
        repeats: How often each prompt was decoded in each way.
        max_new_tokens: Most tokens for each.
        entries: All that took part; layerskip's plain decoding is the first.
        left_out: Why others could not take part, by name.
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

    @property
    def best(self) -> Entry | None:
        """The fastest of those that were shown to be faster than plain decoding; None if none was."""
        return max((one for one in self.entries if one.pays), key=lambda one: one.speedup.value, default=None)

    @property
    def prompts(self) -> int:
        """How many prompts were decoded."""
        return len(self.entries[0].prompts)


def advice(comparison: Comparison) -> str:
    """What to use on that machine, in one sentence."""
    best = comparison.best
    if best is not None:
        return f"Use {best.name} here: it decodes {best.speedup} as fast as plain decoding."
    return f"Decode plainly here: {FEW_PROMPTS if comparison.prompts < FEWEST_PROMPTS else NOTHING_FASTER}."


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What one wants to know of a comparison beside its figures, as (name, value)."""
    times = f"{comparison.repeats} times" if comparison.repeats > 1 else "once"
    return [
        ("model", comparison.model),
        ("machine", f"{comparison.device}, {comparison.dtype}, {comparison.engine} engine"),
        ("versions", ", ".join(f"{name} {version}" for name, version in comparison.versions.items())),
        ("prompts", f"{comparison.prompts} of at most {comparison.max_new_tokens} tokens, each {times}, interleaved"),
    ]


def described(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values, for JSON."""
    best = comparison.best
    alone = ("model", "device", "dtype", "engine", "prompts", "repeats", "max_new_tokens")
    return {
        **{name: getattr(comparison, name) for name in alone},
        "versions": dict(comparison.versions),
        "entries": [_described(one) for one in comparison.entries],
        "left_out": dict(comparison.left_out),
        "best": None if best is None else best.name,
        "advice": advice(comparison),
    }


def _described(one: Entry) -> dict[str, Any]:
    values = {field.name: getattr(one, field.name) for field in fields(one)}
    prompts, speedup = values.pop("prompts"), values.pop("speedup")
    return {
        **values,
        "speedup": speedup.value,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "prompt_speedups": {prompt.prompt: speedup_of_prompt(prompt) for prompt in prompts},
        "pays": one.pays,
    }


# What the columns of the table say.
COLUMNS: Mapping[str, str] = {
    "tokens/s": "median over the repeats, prefill included",
    "range": "slowest and fastest repeat",
    "speedup": "against layerskip's plain decoding",
    "95 %": "the speedup's interval, from resampling prompts",
    "α": "accepted ÷ drafted tokens",
    "τ": "new tokens for each pass of the target model",
    "c": "time to draft a token, in plain steps",
    "drafting": "part of the time that goes into it",
    "memory": "what the draft keeps beside the model",
    "peak": "most device memory in use beside the models",
    "training": "time that the draft was trained",
    "output": "whether it is that of plain decoding",
}


def table(comparison: Comparison) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """All figures, as text: the names of the columns, and a row of cells for each entry.

    A column in which nobody has anything to say is left out.
    """
    rows = [_cells(one) for one in comparison.entries]
    said = [name for name in COLUMNS if any(row[name] for row in rows)]
    names = [one.name for one in comparison.entries]
    return ("", *said), [(name, *(row[column] for column in said)) for name, row in zip(names, rows, strict=True)]


def _cells(one: Entry) -> dict[str, str]:
    has_interval = one.speedup.low < one.speedup.high
    return {
        "tokens/s": f"{one.tokens_per_second:.1f}",
        "range": f"{one.lowest:.1f} to {one.highest:.1f}" if one.lowest < one.highest else "",
        "speedup": f"{one.speedup.value:.2f}×",
        "95 %": f"{one.speedup.low:.2f} to {one.speedup.high:.2f}" if has_interval else "",
        "α": "" if one.acceptance_rate is None else f"{one.acceptance_rate:.0%}",
        "τ": f"{one.tokens_per_pass:.2f}",
        "c": "" if one.draft_cost is None else f"{one.draft_cost:.2f}",
        "drafting": f"{one.draft_share:.0%}" if one.draft_cost is not None else "",
        "memory": _megabytes(one.draft_bytes) if one.draft_bytes else "",
        "peak": "" if one.peak_bytes is None else _megabytes(one.peak_bytes),
        "training": "" if one.training_seconds is None else _duration(one.training_seconds),
        "output": _output(one),
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _output(one: Entry) -> str:
    parts = [f"{one.different} differ"] * (one.different > 0)
    parts += [f"{one.near_ties} at near-ties"] * (one.near_ties > 0)
    return ", ".join(parts) or "same"
