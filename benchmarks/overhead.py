"""What decoding spends outside forward passes, and whether its speedup is the one that α, c and v predict.

python -m benchmarks.overhead draft_profile.json
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.setting import Setting, load_setting, machine_of, write_json
from layerskip import DraftProfile, generate
from layerskip.drafting.drafter import Drafter
from layerskip.engine import DraftStep, EagerEngine, Engine, Scored, SharedPrefix
from layerskip.kv_cache import KVCache
from layerskip.sublayers import Stack
from layerskip.token_tree import TokenTree
from layerskip.utils import device_seconds

console = Console(highlight=False, width=150)
Result = TypeVar("Result")


class TimedEngine(EagerEngine):
    """Keeps the seconds of every pass, device-synchronized, by what it was for."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.model)
        self.costs = engine.costs
        self._device = engine.model.device
        self.passes: dict[str, list[float]] = defaultdict(list)

    def prefill(self, tokens: Tensor, cache: KVCache) -> Scored:
        return self._timed("prefill", lambda: super(TimedEngine, self).prefill(tokens, cache))

    def draft_step(self, token: Tensor, cache: KVCache, stack: Stack) -> DraftStep:
        return self._timed("draft", lambda: super(TimedEngine, self).draft_step(token, cache, stack))

    def verify(
        self, tokens: Tensor, cache: KVCache, shared: SharedPrefix | None = None, tree: TokenTree | None = None
    ) -> Scored:
        return self._timed(
            f"verify {len(tokens)}", lambda: super(TimedEngine, self).verify(tokens, cache, shared, tree)
        )

    def _timed(self, name: str, run: Callable[[], Result]) -> Result:
        started = device_seconds(self._device)
        result = run()
        self.passes[name].append(device_seconds(self._device) - started)
        return result


@dataclass(frozen=True)
class Overhead:
    """One way to decode, over all prompts and repeats.

    Args:
        name: Plain, or the profile.
        outside: Share of the time spent outside forward passes.
        measured: Speedup over plain decoding, prefill left out; 1 for plain decoding itself.
        predicted: The same from the counts of draft steps and verifications and the medians of what each costs.
    """

    name: str
    outside: float
    measured: float
    predicted: float


def decode_all(setting: Setting, engine: Engine, drafter: Drafter | None, max_new_tokens: int) -> tuple[float, int]:
    """Seconds and tokens of all prompts."""
    tokens = 0
    started = device_seconds(setting.model.device)
    for prompt in setting.prompts:
        generation = generate(
            setting.model, prompt.tokens, engine=engine, drafter=drafter, max_new_tokens=max_new_tokens
        )
        tokens += len(generation.tokens)
    return device_seconds(setting.model.device) - started, tokens


def measure(setting: Setting, profile: Path, *, max_new_tokens: int, repeats: int) -> list[Overhead]:
    """Decode plainly and with a profile, in turn, every pass timed."""
    engines = {"plain": TimedEngine(setting.engine), profile.stem: TimedEngine(setting.engine)}
    drafters: dict[str, Drafter | None] = {"plain": None}
    drafters[profile.stem] = DraftProfile.load(profile).drafter(setting.model)
    seconds, tokens = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            spent, made = decode_all(setting, engine, drafters[name], max_new_tokens)
            if repeat == 0:  # warm-up
                engine.passes.clear()
                continue
            seconds[name] += spent
            tokens[name] += made
    decoding = {name: seconds[name] - sum(engine.passes["prefill"]) for name, engine in engines.items()}
    in_passes = {name: sum(map(sum, engine.passes.values())) for name, engine in engines.items()}
    predicted = {name: _predicted(engine) / tokens[name] for name, engine in engines.items()}
    return [
        Overhead(
            name=name,
            outside=1 - in_passes[name] / seconds[name],
            measured=(decoding["plain"] / tokens["plain"]) / (decoding[name] / tokens[name]),
            predicted=predicted["plain"] / predicted[name],
        )
        for name in engines
    ]


def _predicted(engine: TimedEngine) -> float:
    """Seconds behind the prompts: what each kind of pass usually costs, times how often it ran."""
    return sum(statistics.median(times) * len(times) for name, times in engine.passes.items() if name != "prefill")


def main(
    profile: Path,
    model: str = "smollm2",
    device: str = "auto",
    dtype: str = "auto",
    prompts: int = 6,
    max_new_tokens: int = 48,
    repeats: int = 3,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Measure a profile's overhead and its predicted speedup."""
    setting = load_setting(model, device=device, dtype=dtype, prompts=prompts, max_new_tokens=max_new_tokens)
    with torch.inference_mode():
        figures = measure(setting, profile, max_new_tokens=max_new_tokens, repeats=repeats)
    costs = setting.engine.costs
    if costs is not None:
        console.print("v(k): " + " · ".join(f"{width}: {costs.relative(width):.2f}" for width in costs.sublayers))
    for one in figures:
        console.print(
            f"{one.name}: {one.outside:.1%} outside forward passes · speedup measured {one.measured:.3f}×, "
            f"predicted {one.predicted:.3f}×, ratio {one.measured / one.predicted:.3f}"
        )
    write_json(
        json, {"machine": machine_of(setting.model), "model": model, "figures": [asdict(one) for one in figures]}
    )


if __name__ == "__main__":
    typer.run(main)
