"""What each training loss gives: the same texts, steps and seed, and held-out agreement.

Texts are written once and kept; every training begins anew.

python -m benchmarks.losses
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.setting import machine_of, write_json
from layerskip import LayerSkipModel, load_checkpoint
from layerskip.checkpoints import cache_folder
from layerskip.fingerprint import identify
from layerskip.training import (
    LOSSES,
    RANKS,
    DataSettings,
    SelfWrittenPrompts,
    TrainingSettings,
    TuningData,
    train,
    vocabulary_of,
)
from search.train_draft import AboveExit, TunedDraft, TunedHeads

console = Console(highlight=False, width=150)


def draft_of(model: LayerSkipModel, kind: str, exit: int, heads: int, seed: int) -> TunedDraft:
    """A kind of draft, untrained."""
    if kind in ("layer", "bridge"):
        return AboveExit(model, kind, exit)  # type: ignore[arg-type]
    return TunedHeads(model, kind, heads, seed=seed)  # type: ignore[arg-type]


def main(
    model: str = "smollm2",
    device: str = "auto",
    dtype: str = "float32",
    kind: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    loss: Annotated[list[str] | None, typer.Option(help="Likewise; none takes all.")] = None,
    exit: int = 4,
    heads: int = 4,
    positions: int = 64_000,
    epochs: int = 3,
    draft_vocabulary: int = 8192,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Train each kind of draft with each loss."""
    checkpoint = load_checkpoint(model, device=device, dtype=dtype)
    wrapped = LayerSkipModel(checkpoint.model)
    source = SelfWrittenPrompts(wrapped, checkpoint.tokenizer, seed=seed)
    texts = DataSettings(exit, seed=seed)
    data = TuningData(wrapped, source, texts, cache_folder(), identify(wrapped, model).fingerprint)
    shards = data.collect(positions, lambda written: None)
    ids = vocabulary_of(wrapped, shards, draft_vocabulary)
    rows: list[dict[str, Any]] = []
    table = Table("kind", "loss", *(f"top {k}" for k in RANKS), "ideal speedup", "minutes", box=None)
    for one, by in product(kind or ["layer", "hydra"], [name for name in LOSSES if name in (loss or LOSSES)]):
        draft = draft_of(wrapped, one, exit, heads, seed)
        learner = draft.learner(shards)
        began = time.perf_counter()
        settings = TrainingSettings(loss=by, epochs=epochs, seed=seed)
        trained = train(wrapped, learner, shards, settings, token_ids=ids)
        minutes = (time.perf_counter() - began) / 60
        ideal = draft.ideal(learner, ids)(trained.agreement)
        by_place = [dict(top) for top in trained.agreement.by_place]
        rows.append({"kind": one, "loss": by, "top": by_place, "ideal": ideal, "minutes": minutes})
        for place, top in enumerate(by_place, start=1):
            name = one if len(by_place) == 1 else f"{one}, head {place}"
            ends = (f"{ideal:.2f}×", f"{minutes:.1f}") if place == 1 else ("", "")
            table.add_row(name, by, *(f"{top[k]:.1%}" for k in RANKS), *ends)
        console.print(rows[-1])
    console.print(table)
    figures = {"machine": machine_of(wrapped), "model": model, "positions": shards.positions, "epochs": epochs}
    write_json(json, figures | {"figures": rows})


if __name__ == "__main__":
    typer.run(main)
