"""What differs between two draft profiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerskip.drafting.bridges import Bridge
from layerskip.drafting.draft_layer import DraftLayerWeights
from layerskip.profile import DraftProfile
from layerskip.skip_set import SkipSet


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
    found = [
        *_model(a, b),
        *_skipped(a, b),
        *_drafts(a, b),
        *_stand_ins("bridges", a.assets.bridges, b.assets.bridges),
        *_stand_ins("layers", a.assets.layers, b.assets.layers),
        *_heads(a, b),
        *_vocabulary(a, b),
        *_measured(a, b),
    ]
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
    yield Difference("copies", a.ngrams and str(a.ngrams), b.ngrams and str(b.ngrams))


def _stand_ins(
    what: str, of_a: Mapping[int, Bridge | DraftLayerWeights], of_b: Mapping[int, Bridge | DraftLayerWeights]
) -> Iterable[Difference]:
    """By the sublayers that they stand for, and where those are the same, by their weights."""
    spans_a, spans_b = ([_span(one) for one in of.values()] for of in (of_a, of_b))
    other_weights = [
        f"other weights in {_span(one)}"
        for start, one in of_a.items()
        if start in of_b and of_b[start].stop == one.stop and not _same_weights(one, of_b[start])
    ]
    yield Difference(what, spans_a, spans_b, tuple(other_weights))


def _span(one: Bridge | DraftLayerWeights) -> str:
    return f"{one.start}-{one.stop - 1}" if one.start < one.stop else "behind all"


def _same_weights(a: Bridge | DraftLayerWeights, b: Bridge | DraftLayerWeights) -> bool:
    of_a, of_b = _weights(a), _weights(b)
    return of_a.keys() == of_b.keys() and all(torch.equal(of_a[name], of_b[name]) for name in of_a)


def _weights(one: Bridge | DraftLayerWeights) -> dict[str, Tensor]:
    """By name; a layer's with the model's layer that it is built like."""
    if isinstance(one, Bridge):
        return {str(number): part for number, part in enumerate((*one.factors, one.bias))}
    return {f"{one.like}.{name}": weight for name, weight in one.weights.items()}


def _heads(a: DraftProfile, b: DraftProfile) -> Iterable[Difference]:
    """By their kind and number, and where those are the same, by their weights."""
    of_a, of_b = a.assets.heads, b.assets.heads
    named_a, named_b = ("none" if heads is None else f"{heads.count} {heads.kind}" for heads in (of_a, of_b))
    notes = []
    if of_a is not None and of_b is not None and named_a == named_b:
        weights_a, weights_b = of_a.tensors(), of_b.tensors()
        if not all(torch.equal(weight, weights_b[name]) for name, weight in weights_a.items()):
            notes.append("other weights")
    yield Difference("draft heads", named_a, named_b, tuple(notes))


def _vocabulary(a: DraftProfile, b: DraftProfile) -> Iterable[Difference]:
    """By its size and by how many tokens both have."""
    ids_a, ids_b = (set() if p.assets.token_ids is None else set(p.assets.token_ids.tolist()) for p in (a, b))
    both = len(ids_a & ids_b)
    differ = ids_a and ids_b and ids_a != ids_b
    notes = [f"{both} in both"] if differ else ["0 is the whole one"] * (bool(ids_a) != bool(ids_b))
    yield Difference("vocabulary", len(ids_a), len(ids_b), tuple(notes))


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
