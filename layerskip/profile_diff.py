"""What differs between two draft profiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from layerskip.drafts.bridges import Bridge
from layerskip.profile import DraftProfile
from layerskip.stack.skipset import SkipSet


@dataclass(frozen=True)
class Difference:
    """One thing in which two profiles differ.

    Args:
        what: Its name.
        a: What the first profile has, as a plain value.
        b: What the second one has.
        notes: What the two values do not show by themselves, for people.
    """

    what: str
    a: Any
    b: Any
    notes: tuple[str, ...] = field(default=())


def differences(a: DraftProfile, b: DraftProfile) -> list[Difference]:
    """What differs, in the order of ``layerskip profile show``; nothing if both draft alike and measured the same.

    Where a profile comes from (study, trial, date) and what its files are called is not compared.

    Args:
        a: A profile that was loaded with its tensors.
        b: Another.
    """
    found = [*_model(a, b), *_skipped(a, b), *_drafts(a, b), *_bridges(a, b), *_vocabulary(a, b), *_measured(a, b)]
    return [difference for difference in found if difference.a != difference.b or difference.notes]


def _model(a: DraftProfile, b: DraftProfile) -> Iterable[Difference]:
    for name, (of_a, of_b) in a.model.differences(b.model).items():
        yield Difference(f"model.{name}", of_a, of_b)


def _skipped(a: DraftProfile, b: DraftProfile) -> Iterable[Difference]:
    notes = []
    if a.skip_set != b.skip_set and a.skip_set.num_layers == b.skip_set.num_layers:
        for letter, one, other in (("A", a.skip_set, b.skip_set), ("B", b.skip_set, a.skip_set)):
            notes += [f"only in {letter}: {only}"] if len(only := _without(one, other)) else []
    yield Difference("skipped", str(a.skip_set), str(b.skip_set), tuple(notes))


def _without(one: SkipSet, other: SkipSet) -> SkipSet:
    """What one leaves out and the other does not."""
    kinds = ((one.attention, other.attention), (one.mlp, other.mlp))
    attention, mlp = (tuple(sorted(set(own) - set(others))) for own, others in kinds)
    return SkipSet(one.num_layers, attention, mlp)


def _drafts(a: DraftProfile, b: DraftProfile) -> Iterable[Difference]:
    yield Difference("draft", str(a.draft_exit), str(b.draft_exit))
    yield Difference("gate", a.gate, b.gate)
    yield Difference("branches", list(a.branches), list(b.branches))
    yield Difference("copies", str(a.ngrams), str(b.ngrams))


def _bridges(a: DraftProfile, b: DraftProfile) -> Iterable[Difference]:
    """By the sublayers that they stand for, and where those are the same, by their weights."""
    of_a, of_b = a.assets.bridges, b.assets.bridges
    spans_a, spans_b = ([f"{bridge.start}-{bridge.stop - 1}" for bridge in of.values()] for of in (of_a, of_b))
    other_weights = [
        f"other weights in {bridge.start}-{bridge.stop - 1}"
        for start, bridge in of_a.items()
        if start in of_b and of_b[start].stop == bridge.stop and not _same_weights(bridge, of_b[start])
    ]
    yield Difference("bridges", spans_a, spans_b, tuple(other_weights))


def _same_weights(a: Bridge, b: Bridge) -> bool:
    of_a, of_b = (*a.factors, a.bias), (*b.factors, b.bias)
    return len(of_a) == len(of_b) and all(torch.equal(one, other) for one, other in zip(of_a, of_b, strict=True))


def _vocabulary(a: DraftProfile, b: DraftProfile) -> Iterable[Difference]:
    """By its size, 0 being the whole one, and by how many tokens both have."""
    ids_a, ids_b = (set() if p.assets.token_ids is None else set(p.assets.token_ids.tolist()) for p in (a, b))
    both = len(ids_a & ids_b)
    differ = ids_a and ids_b and ids_a != ids_b
    yield Difference("vocabulary", len(ids_a), len(ids_b), (f"{both} in both",) if differ else ())


def _measured(a: DraftProfile, b: DraftProfile) -> Iterable[Difference]:
    if a.measured is None or b.measured is None:
        yield Difference("measured", a.measured and a.measured.speedup, b.measured and b.measured.speedup)
        return
    overlap = a.measured.speedup_low <= b.measured.speedup_high and b.measured.speedup_low <= a.measured.speedup_high
    note = "the 95 % intervals overlap" if overlap else "the 95 % intervals lie apart"
    of_a, of_b = a.measured.model_dump(), b.measured.model_dump()
    for name in of_a:
        notes = (note,) if name == "speedup" and of_a != of_b else ()
        yield Difference(f"measured.{name}", of_a[name], of_b[name], notes)
