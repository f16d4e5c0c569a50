"""What branching brings: one trained draft as the best chain and as the best tree.

Each shape is chosen by replay at the costs of this machine; then all decode the same held-out prompts, interleaved.

python -m benchmarks.trees --profile tuned.json
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.setting import load_setting, loaded_profiles, machine_of, write_json
from layerskip import DraftProfile, LayerSkipModel
from layerskip.checkpoints import cache_folder
from layerskip.fingerprint import identify
from search.compare import compare
from search.decoding_methods import DecodingMethod, layerskip_method
from search.latency import LatencyModel, measure_latency
from search.machine_lock import MachineLock
from search.prompts import EncodedPrompt
from search.reference import ReferenceRun
from search.replay import Prediction
from search.space import SearchSpace
from search.train_draft import AboveExit, ReplayGround, TunedDraft, TunedHeads, exit_of, space_for
from studies.comparison import Entry
from studies.statistics import speedup_of_all

console = Console(highlight=False, width=150)
_WIDTHS = (1, 2, 4, 8, 16, 24)


def draft_of(model: LayerSkipModel, profile: DraftProfile) -> TunedDraft:
    """What a profile of 'layerskip tune' drafts with."""
    if profile.assets.heads is not None:
        return TunedHeads(model, profile.assets.heads.kind, profile.assets.heads.count, seed=0)
    return AboveExit(model, "layer" if profile.assets.layers else "bridge", exit_of(profile.skip_set))


def shapes(
    model: LayerSkipModel,
    profile: DraftProfile,
    prompts: tuple[EncodedPrompt, ...],
    fingerprint: str,
    max_new_tokens: int,
) -> tuple[dict[str, Prediction], LatencyModel]:
    """The best policy with chains alone, and with branches; both with copies where these pay."""
    draft, assets = draft_of(model, profile), profile.assets.to(torch.empty(0, dtype=model.dtype, device=model.device))
    texts = ReferenceRun(model, cache_folder(), fingerprint).texts(prompts, max_new_tokens=max_new_tokens)
    space = space_for(draft, assets, SearchSpace.of(model))
    latency, costs = measure_latency(model, space), draft.costs(assets)
    spaces = {"chain": replace(space, trees=()), "tree": space}
    grounds = {name: ReplayGround(texts, one, latency, costs, max_new_tokens) for name, one in spaces.items()}
    return {name: draft.best_policy(assets, ground) for name, ground in grounds.items()}, latency


@dataclass(frozen=True)
class _Both:
    plain_seconds: float
    draft_seconds: float
    tokens: int
    draft_tokens: int


def ratio_of(chain: Entry, tree: Entry) -> str:
    """How much faster the tree is, with its interval over the prompts."""
    pairs = [
        _Both(one.draft_seconds, other.draft_seconds, one.draft_tokens, other.draft_tokens)
        for one, other in zip(chain.prompts, tree.prompts, strict=True)
    ]
    ratio = speedup_of_all(pairs)
    return f"{ratio.value:.3f} (95 %: {ratio.low:.3f} to {ratio.high:.3f})"


def main(
    model: str = "smollm2",
    profile: Annotated[list[Path] | None, typer.Option(help="Of 'layerskip tune'; may be given several times.")] = None,
    device: str = "auto",
    dtype: str = "auto",
    prompts: int = 8,
    max_new_tokens: int = 48,
    repeats: int = 3,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Compare each draft's best tree with its best chain."""
    setting = load_setting(model, device=device, dtype=dtype, prompts=prompts, max_new_tokens=max_new_tokens)
    fingerprint = identify(setting.model, model).fingerprint
    contenders = [DecodingMethod("plain", layerskip_method(setting.model, None))]
    predictions: dict[str, Prediction] = {}
    profiles = loaded_profiles(profile or [], model, device=device, dtype=dtype)
    for name, one in profiles.items():
        best, latency = shapes(setting.model, one, setting.search, fingerprint, max_new_tokens)
        for shape, prediction in best.items():
            with_shape = one.model_copy(update=vars(prediction.policy)).with_assets(one.assets)
            predictions[f"{name}, {shape}"] = prediction
            way = layerskip_method(setting.model, with_shape.drafter(setting.model))
            contenders.append(DecodingMethod(f"{name}, {shape}", way))
    entries = compare(
        setting.model,
        contenders,
        setting.prompts,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        quiet=MachineLock(cache_folder(), setting.model.device),
        on_prompt=lambda done: console.print(f"{done} of {repeats * len(setting.prompts)} done"),
    )
    plain = latency.verification(1, 0.0, 128, None)
    widths = {width: latency.verification(width, 0.0, 128, None) / plain for width in _WIDTHS}
    console.print("a pass over k tokens, in plain steps:", {k: round(cost, 2) for k, cost in widths.items()})
    table = Table("", "speedup", "foretold", "tokens a pass", "different", "shape", box=None)
    for entry in entries:
        told = predictions.get(entry.name)
        foretold, policy = (f"{told.speedup:.3f}×", str(told.policy)) if told else ("", "")
        passed = f"{entry.tokens_per_pass:.2f}"
        table.add_row(entry.name, f"{entry.speedup.value:.3f}×", foretold, passed, str(entry.different), policy)
    console.print(table)
    by_name = {entry.name: entry for entry in entries}
    ratios = {name: ratio_of(by_name[f"{name}, chain"], by_name[f"{name}, tree"]) for name in profiles}
    for name, ratio in ratios.items():
        console.print(f"{name}: the tree is {ratio} times as fast as the chain")
    speedups = {entry.name: entry.speedup.value for entry in entries}
    policies = {name: str(one.policy) for name, one in predictions.items()}
    figures = {"machine": machine_of(setting.model), "model": model, "widths": widths, "policies": policies}
    write_json(json, figures | {"speedups": speedups, "ratios": ratios})


if __name__ == "__main__":
    typer.run(main)
