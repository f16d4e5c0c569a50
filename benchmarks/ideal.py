"""What draft heads would give where verifying any number of tokens costs one plain step, and drafting what it reads.

Replayed along what the target model writes on held-out prompts: no clock, so it says the same on every machine.

python -m benchmarks.ideal
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.setting import load_setting, loaded_profiles, machine_of, write_json
from layerskip import DraftProfile, LayerSkipModel, SkipSet
from layerskip.checkpoints import cache_folder
from layerskip.fingerprint import identify
from layerskip.training.evaluation import head_costs_by_weights
from search.head_replay import DraftSeconds, HeadCosts, HeadTrace, head_policies, replay_heads, trace_heads
from search.reference import ReferenceRun, ReferenceText
from search.replay import Prediction
from search.space import Policy, SearchSpace

console = Console(highlight=False, width=150)
RANKS = (1, 2, 4, 8)


def replayed(
    model: LayerSkipModel, profile: DraftProfile, texts: Sequence[ReferenceText], limit: int
) -> tuple[list[HeadTrace], dict[str, Prediction]]:
    """A profile's traces, and what it comes to with its own draft exit and branches, and with the best ones."""
    assets = profile.assets.to(torch.empty(0, dtype=model.dtype, device=model.device))
    if assets.heads is None:
        raise typer.BadParameter("the profile has no draft heads")
    stack, prefix = model.stack_of(SkipSet(model.num_layers), token_ids=assets.token_ids), assets.prefix(model)
    traces = [trace_heads(model, assets.heads, stack, text, prefix) for text in texts]
    read = [0.0, *head_costs_by_weights(model, assets.heads, stack, prefix)]
    draft = DraftSeconds(0.0, [[after - before] for before, after in pairwise(read)], [1])
    space = SearchSpace.of(model, ngrams=False)
    flat = [1.0] * (space.most_drafted + 1)
    costs = HeadCosts(draft, [1.0] * len(texts), [flat] * len(texts), assets.heads.at_once)
    own = Policy(profile.draft_exit, profile.gate, profile.branches)
    best = list(head_policies(traces, assets.heads.count, space))
    tried = {"its own draft exit and branches": [own], "the best ones": best}
    return traces, {name: replay_heads(traces, some, costs, limit=limit) for name, some in tried.items()}


def main(
    model: str = "smollm2",
    profile: Annotated[
        list[Path] | None, typer.Option(help="May be given several times; none takes the ready one.")
    ] = None,
    device: str = "auto",
    dtype: str = "auto",
    prompts: int = 8,
    max_new_tokens: int = 48,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Replay profiles with draft heads at such costs."""
    setting = load_setting(model, device=device, dtype=dtype, prompts=prompts, max_new_tokens=max_new_tokens)
    run = ReferenceRun(setting.model, cache_folder(), identify(setting.model, model).fingerprint)
    texts = run.texts(setting.prompts, max_new_tokens=max_new_tokens)
    figures = {}
    for name, one in loaded_profiles(profile or [], model, device=device, dtype=dtype).items():
        traces, predictions = replayed(setting.model, one, texts, max_new_tokens)
        table = Table(name, *(f"top {k}" for k in RANKS), box=None)
        tops = []
        for place in range(len(traces[0].ranks)):
            ranks = torch.cat([torch.from_numpy(trace.ranks[place]) for trace in traces])
            tops.append({k: float((ranks < k).float().mean()) for k in RANKS})
            table.add_row(f"head {place + 1}", *(f"{tops[-1][k]:.1%}" for k in RANKS))
        console.print(table)
        for which, prediction in predictions.items():
            console.print(f"with {which}: {prediction.speedup:.2f}×, {prediction.policy}")
        figures[name] = {"top": tops} | {which: one.speedup for which, one in predictions.items()}
    write_json(json, {"machine": machine_of(setting.model), "model": model, "figures": figures})


if __name__ == "__main__":
    typer.run(main)
