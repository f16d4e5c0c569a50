"""What the stages of a run share: the device, the shapes, and models and engines that are made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda.facts import Facts, read_facts
from benchmarks.cuda.shapes import SHAPES, Plant, Redundancy, sharp_model
from layerskip.engine import DraftStep, Engine, GraphEngine
from layerskip.engine.graph_capture import Capture, Outputs
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sublayers import Stack


class RunsAnew:
    """Stands in for CUDA graphs where there is no device to capture on: a replay runs the pass anew."""

    def __call__(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        return run

    def renew(self) -> None:
        pass


def new_graph_engine(model: LayerSkipModel, *, in_place: bool = True) -> GraphEngine:
    """An engine of captured passes; on a CPU, of passes that run anew."""
    capture: Capture | None = None if model.device.type == "cuda" else RunsAnew()
    return GraphEngine(model, capture, in_place=in_place)


@dataclass(frozen=True)
class Bench:
    """A run.

    Args:
        device: Where models are.
        shape: Name of the main model's shape.
        out: Folder of the results.
        deadline: When the run ends, in seconds since the epoch.
    """

    device: torch.device
    shape: str
    out: Path
    deadline: float

    @property
    def facts(self) -> Path:
        """The file of facts."""
        return self.out / "facts.jsonl"

    @property
    def is_tiny(self) -> bool:
        """Whether shapes are toys, and so should be repeats and lengths."""
        return self.shape == "tiny"

    @property
    def dtype(self) -> torch.dtype:
        """Of the main model."""
        return torch.bfloat16

    @property
    def context(self) -> int:
        """Length of the text after which passes are timed."""
        return 64 if self.is_tiny else 512 - 128

    @cached_property
    def redundancy(self) -> Redundancy:
        """Which sublayers of the main model add little."""
        return Redundancy.of(2 * SHAPES[self.shape]().num_hidden_layers)

    @cached_property
    def _planted(self) -> tuple[LayerSkipModel, Plant]:
        with torch.inference_mode(False):  # weights that are made in it cannot be changed outside
            model = sharp_model(SHAPES[self.shape](), self.device, self.dtype)
            return model, Plant(model, self.redundancy)

    def planted(self, acceptance: float) -> tuple[LayerSkipModel, float]:
        """The main model, such that a draft without its weak sublayers is accepted so often; and their strength.

        Wrapped anew, because copies at lower precision keep what weights were.
        """
        model, plant = self._planted
        skip_set = self.redundancy.skip_set(model.num_layers)
        strength = plant.find(acceptance, skip_set, self.tokens(64 if self.is_tiny else 256, seed=1))
        return LayerSkipModel(model.hf_model), strength

    @cached_property
    def model(self) -> LayerSkipModel:
        """The main model, whatever of it adds little."""
        return LayerSkipModel(self._planted[0].hf_model)

    @cached_property
    def engine(self) -> GraphEngine:
        """Captured passes of the main model."""
        return new_graph_engine(self.model)

    def tokens(self, count: int, seed: int = 0) -> Tensor:
        """Random token ids, ``[count]``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (count,), generator=generator).to(self.device)

    def fact(self, stage: str, name: str) -> float | None:
        """The number of a fact that an earlier stage wrote down; None if it did not."""
        found = [fact["value"] for fact in read_facts(self.facts) if (fact["stage"], fact["name"]) == (stage, name)]
        return float(found[-1]) if found else None


class Passes:
    """The passes of an engine after a text of some length, each of which leaves the cache as it was.

    Args:
        engine: The engine, without costs, so that passes are as wide as what is asked for.
        context: The text's length.
        tokens: Of which the text is made, ``[n]``, at least as many.
    """

    def __init__(self, engine: Engine, context: int, tokens: Tensor) -> None:
        self._engine, self._context, self._tokens = engine, context, tokens
        self.cache: KVCache = engine.new_cache(context + 32)
        engine.prefill(tokens[:context], self.cache)

    def verify(self, width: int) -> Tensor:
        """The logits of a verification of ``width`` tokens."""
        scored = self._engine.verify(self._tokens[:width], self.cache)
        self.cache.rollback(self._context)
        return scored.logits

    def draft(self, stack: Stack) -> DraftStep:
        """A draft step of one token."""
        step = self._engine.draft_step(self._tokens[:1], self.cache, stack)
        self.cache.rollback(self._context)
        return step


Stage = Callable[[Bench, Facts], None]
