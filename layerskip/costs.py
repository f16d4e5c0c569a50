"""What passes cost on this machine, measured once: by width, the sublayers and the head apart."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerskip.checkpoints import cache_folder
from layerskip.utils import device_name, device_seconds, library_versions, write_atomically

if TYPE_CHECKING:
    from layerskip.engine.base import Engine
    from layerskip.model import LayerSkipModel


def speedup(acceptance: float, length: int, draft_cost: float, verification: float) -> float:
    """What a round yields over what it costs: ``(1 - α^(γ + 1)) / (1 - α)`` tokens for ``γ·c + v`` plain steps.

    Args:
        acceptance: The acceptance rate α, from 0 to 1.
        length: The draft length γ.
        draft_cost: The cost c of a draft step, in plain decoding steps.
        verification: The cost v of verifying γ + 1 tokens, likewise.
    """
    # Summed up, and not by the closed form, which is 0 ÷ 0 where α is 1.
    return sum(acceptance**i for i in range(length + 1)) / (length * draft_cost + verification)


def best_speedup(acceptance: float, draft_cost: float, verification: Callable[[int], float], longest: int) -> float:
    """The :func:`speedup` at the best draft length.

    Args:
        acceptance: As in :func:`speedup`.
        draft_cost: Likewise.
        verification: The cost of verifying so many tokens, in plain decoding steps.
        longest: The longest draft to consider.
    """
    return max(speedup(acceptance, n, draft_cost, verification(n + 1)) for n in range(1, longest + 1))


logger = logging.getLogger(__name__)

# Wide enough for the largest tree that a search tries, and for the dips that CPUs have.
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24)
# A text of usual length; attention is a small part of a pass until contexts are much longer.
_CONTEXT = 128
_REPEATS = 7
# Least share of a pass that its sublayers take, should a noisy moment say that its head took all of it.
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class PassCosts:
    """Seconds of a pass of the target model, by the number of tokens in it.

    Args:
        sublayers: Of all sublayers together.
        head: Of the final norm and the head.
    """

    sublayers: Mapping[int, float]
    head: Mapping[int, float]

    @classmethod
    def of(cls, whole: Mapping[int, float], head: Mapping[int, float]) -> PassCosts:
        """From seconds of whole passes and of their heads: the sublayers are the rest, however noisy the moment was."""
        head = {width: min(head[width], (1 - _LEAST_SHARE) * seconds) for width, seconds in whole.items()}
        return cls({width: seconds - head[width] for width, seconds in whole.items()}, head)

    def seconds(self, width: int) -> float:
        """Of a whole pass of a measured width."""
        return self.sublayers[width] + self.head[width]

    def relative(self, width: int) -> float:
        """The verification cost v: seconds of a pass in units of a plain decoding step."""
        return self.seconds(width) / self.seconds(1)

    def cheapest_width(self, needed: int) -> int:
        """The width, at least ``needed``, whose pass costs least; ``needed`` itself beyond what was measured."""
        wide_enough = [width for width in self.sublayers if width >= needed]
        return min(wide_enough, key=self.seconds, default=needed)

    def saved_by_resuming(self, width: int, share: float) -> float:
        """Seconds saved if a pass starts behind a share of the sublayers, which only one token has yet to go through.

        Negative where that one token costs more than taking all of them along.
        """
        return share * (self.sublayers.get(width, self.sublayers[max(self.sublayers)]) - self.sublayers[1])


@torch.inference_mode()
def measure_costs(model: LayerSkipModel, widths: Sequence[int] = WIDTHS) -> PassCosts:
    """Measure the passes of a model's engine: medians of interleaved repeats behind a text of usual length.

    Whole passes are the engine's own verifications. The head is timed by itself, and the sublayers are the rest.

    Args:
        model: The model; its engine must not be in the middle of a generation.
        widths: Numbers of tokens to measure; 1 is among them.
    """
    context = max(min(_CONTEXT, model.context_length - max(widths)), 1)
    with exact_widths(model.engine):
        whole, head = _measure(model, widths, context)
    return PassCosts.of(whole, head)


@contextmanager
def exact_widths(engine: Engine) -> Iterator[None]:
    """Let an engine verify at the width that is needed meanwhile, as it does without costs."""
    costs, engine.costs = engine.costs, None
    try:
        yield
    finally:
        engine.costs = costs


def _measure(model: LayerSkipModel, widths: Sequence[int], context: int) -> tuple[dict[int, float], dict[int, float]]:
    """Median seconds of whole passes and of the head, by width."""
    cache = model.engine.new_cache(context + max(widths))
    tokens = torch.zeros(max(context, *widths), dtype=torch.long, device=model.device)
    model.engine.prefill(tokens[:context], cache)
    states = model.embed(tokens[: max(widths)])

    def verify(width: int) -> None:
        model.engine.verify(tokens[:width], cache)
        cache.rollback(context)

    def score(width: int) -> None:
        model.logits(states[:, :width])

    for width in widths:  # the first pass of a width is slow: buffers are made, or a graph is captured
        verify(width)
        score(width)
    whole: dict[int, list[float]] = {width: [] for width in widths}
    head: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(_REPEATS):
        for width in widths:
            whole[width].append(_seconds(model, verify, width))
            head[width].append(_seconds(model, score, width))
    return _medians(whole), _medians(head)


def calibrate(model: LayerSkipModel, folder: Path | None = None) -> PassCosts:
    """Let a model's engine choose the cheapest way to verify, by costs measured on this machine once.

    Args:
        model: The model; its engine keeps the costs.
        folder: Where measured costs are kept; None is :func:`layerskip.checkpoints.cache_folder`.

    Returns:
        The costs, in seconds by the number of tokens in a pass.
    """
    model.engine.costs = load_costs(model, folder or cache_folder())
    return model.engine.costs


def load_costs(model: LayerSkipModel, folder: Path) -> PassCosts:
    """The costs measured for this model, engine, device, dtype and software earlier, or else measured now and kept.

    Args:
        model: The model.
        folder: Where measured costs are kept, such as :func:`layerskip.checkpoints.cache_folder`.
    """
    file = folder / f"costs-{_key(model)}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return PassCosts(*({int(width): seconds for width, seconds in kept[part].items()} for part in _PARTS))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # not there, or not ours
        costs = measure_costs(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(costs), indent=2) + "\n")
    except OSError as error:
        logger.warning("%s: cannot keep what passes cost: %s; the next start measures again", file, error.strerror)
    return costs


_PARTS = ("sublayers", "head")


def _key(model: LayerSkipModel) -> str:
    """Changes with whatever passes take longer or shorter by."""
    config = model.config.to_diff_dict()
    where = [str(model.dtype), device_name(model.device), model.config._attn_implementation, library_versions()]
    what = [config, WIDTHS, _made_of(model.hf_model), model.engine.name, model.compiled, *where]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _made_of(model: nn.Module) -> list[tuple[str, ...]]:
    """The kinds of modules and of their weights, which tell an adapted or a quantized model from the plain one."""
    kinds = set()
    for module in model.modules():
        weights = (f"{type(w).__name__} {w.dtype} {list(w.shape)}" for w in module.parameters(recurse=False))
        kinds.add((type(module).__qualname__, *weights))
    return sorted(kinds)


def _seconds(model: LayerSkipModel, run: Callable[[int], None], width: int) -> float:
    started = device_seconds(model.device)
    run(width)
    return device_seconds(model.device) - started


def _medians(measured: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {width: statistics.median(seconds) for width, seconds in measured.items()}
