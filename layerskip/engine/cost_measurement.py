"""Measuring what an engine's passes cost on this machine, once."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from layerskip.checkpoints import cache_folder
from layerskip.costs import PassCosts
from layerskip.engine.base import Engine
from layerskip.model import LayerSkipModel
from layerskip.utils import device_name, device_seconds, digest, library_versions, write_atomically

logger = logging.getLogger(__name__)

# Wide enough for the largest tree that a search tries, and for the dips that CPUs have.
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24)
# A text of usual length; attention is a small part of a pass until contexts are much longer.
_CONTEXT = 128
_REPEATS = 7


@torch.inference_mode()
def measure_costs(engine: Engine, widths: Sequence[int] = WIDTHS) -> PassCosts:
    """Measure the passes of an engine: medians of interleaved repeats after a text of usual length.

    Whole passes are the engine's own verifications. The head is timed by itself, and the sublayers are the rest.

    Args:
        engine: The engine; it must not be in the middle of a generation.
        widths: Numbers of tokens to measure; 1 is among them.
    """
    context = max(min(_CONTEXT, engine.model.context_length - max(widths)), 1)
    with exact_widths(engine):
        whole, head = _measure(engine, widths, context)
    return PassCosts.of(whole, head)


@contextmanager
def exact_widths(engine: Engine) -> Iterator[None]:
    """Let an engine verify at the width that is needed meanwhile, as it does without costs."""
    costs, engine.costs = engine.costs, None
    try:
        yield
    finally:
        engine.costs = costs


def _measure(engine: Engine, widths: Sequence[int], context: int) -> tuple[dict[int, float], dict[int, float]]:
    """Median seconds of whole passes and of the head, by width."""
    model = engine.model
    cache = engine.new_cache(context + max(widths))
    tokens = torch.zeros(max(context, *widths), dtype=torch.long, device=model.device)
    engine.prefill(tokens[:context], cache)
    states = model.embed(tokens[: max(widths)])

    def verify(width: int) -> None:
        engine.verify(tokens[:width], cache)
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


def load_costs(engine: Engine, folder: Path | None = None) -> PassCosts:
    """What an engine's passes cost: as measured for the same model, device, dtype and software earlier, or now.

    Args:
        engine: The engine; it must not be in the middle of a generation.
        folder: Where measured costs are kept; None is :func:`layerskip.checkpoints.cache_folder`.

    Returns:
        The costs, in seconds by the number of tokens in a pass. Assign them to the engine's ``costs``, and verification
        runs at the cheapest width.
    """
    folder = folder or cache_folder()
    file = folder / f"costs-{_key(engine)}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return PassCosts(*({int(width): seconds for width, seconds in kept[part].items()} for part in _PARTS))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # not there, or not ours
        costs = measure_costs(engine)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(costs), indent=2) + "\n")
    except OSError as error:
        logger.warning("%s: cannot keep what passes cost: %s; the next start measures again", file, error.strerror)
    return costs


_PARTS = ("sublayers", "head")


def _key(engine: Engine) -> str:
    """Changes with whatever passes take longer or shorter by."""
    model = engine.model
    config = model.config.to_diff_dict()
    where = [str(model.dtype), device_name(model.device), model.config._attn_implementation, library_versions()]
    what = [config, WIDTHS, _made_of(model.hf_model), engine.name, model.compiled, *where]
    return digest(what)


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
