"""What Token Recycling would add to copies from the text: simulated along the model's own texts, at measured costs.

python -m benchmarks.recycling --suite spec_bench.jsonl

Source: Luo et al. 2024 (arXiv 2408.08696): a token's last most probable successors make a tree that costs no pass. They
are simulated here at their best: as many as eight, known for the whole prompt at once, and in the tree that these very
texts run through most often.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.setting import machine_of, write_json
from layerskip import LayerSkipModel, PromptLookup, load_checkpoint
from layerskip.costs import PassCosts
from layerskip.drafting.prompt_lookup import LookupText
from layerskip.engine import make_engine
from layerskip.prefix_cache import common_prefix_length
from layerskip.target_texts import TargetText
from search.reference import CHUNK, ReferenceRun
from search.suite import encode_suite, read_suite

console = Console(highlight=False, width=150)
_SUCCESSORS, _DEPTH = 8, 8
_TREES = (3, 7, 15)
_LOOKUP = PromptLookup(shortest=2, length=23, per_match=2)
Path_ = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """A prompt with the model's continuation, and after each token the model's most probable next ones."""

    tokens: list[int]
    prompt_length: int
    successors: list[list[int]]
    category: str


@torch.inference_mode()
def with_successors(model: LayerSkipModel, text: TargetText, category: str) -> Text:
    """A text with its successors, from one pass over it."""
    states = model.forward(text.tokens, model.new_cache(len(text.tokens)))[0]
    tops = [model.logits(part[None]).topk(_SUCCESSORS).indices for part in states.split(CHUNK)]
    return Text(text.tokens.tolist(), text.prompt_length, torch.cat(tops).tolist(), category)


def path_through(successors: dict[int, list[int]], text: Text, newest: int) -> Path_:
    """The ranks that the text runs through from a token on, as far as it follows known successors."""
    path: Path_ = ()
    for before, token in zip(text.tokens[newest:], text.tokens[newest + 1 : newest + 1 + _DEPTH], strict=False):
        known = successors.get(before, [])
        if token not in known:
            break
        path = (*path, known.index(token))
    return path


def best_tree(texts: Sequence[Text], size: int) -> set[Path_]:
    """The tree that texts run through most often, grown token by token."""
    taken: Counter[Path_] = Counter()
    for text in texts:
        successors = dict(zip(text.tokens[: text.prompt_length], text.successors, strict=False))
        for newest in range(text.prompt_length, len(text.tokens) - 1):
            path = path_through(successors, text, newest)
            taken.update(path[: depth + 1] for depth in range(len(path)))
            successors[text.tokens[newest]] = text.successors[newest]
    tree: set[Path_] = set()
    candidates: set[Path_] = {(0,)}
    while len(tree) < size:
        best = max(candidates, key=lambda path: (taken[path], -len(path), -sum(path)))
        tree.add(best)
        candidates = candidates - {best} | {(*best[:-1], best[-1] + 1), (*best, 0)}
    return tree


def speedup(text: Text, cost: Callable[[int], float], tree: set[Path_], *, copies: bool) -> float:
    """Plain steps of a text over those of its rounds, which copy if they may and can, and else verify the tree."""
    first = text.prompt_length
    successors, known = dict(zip(text.tokens[:first], text.successors, strict=False)), LookupText(_LOOKUP)
    known.extend(text.tokens[: first + 1])
    newest, last, steps = first, len(text.tokens) - 1, 0.0
    while newest < last:
        copied = known.copy(_LOOKUP.length) if copies else []
        path = path_through(successors, text, newest) if tree and not copied else ()
        proposed = len(copied) or (len(tree) if text.tokens[newest] in successors else 0)
        accepted = common_prefix_length(copied, text.tokens[newest + 1 :])
        accepted += sum(path[: depth + 1] in tree for depth in range(len(path)))
        accepted = min(accepted, last - newest - 1)
        steps += cost(proposed + 1)
        for at in range(newest, newest + accepted + 1):
            successors[text.tokens[at]] = text.successors[at]
        known.extend(text.tokens[newest + 1 : newest + accepted + 2])
        newest += accepted + 1
    return (last - first) / steps


def relative(costs: PassCosts) -> Callable[[int], float]:
    """The cost of a pass over so many tokens, in plain steps."""
    return lambda tokens: costs.cost(costs.cheapest_width(tokens)) / costs.cost(1)


def main(
    suite: Annotated[Path, typer.Option(help="Questions in Spec-Bench's format.")],
    model: str = "smollm2",
    dtype: str = "float32",
    per_category: int = 5,
    max_new_tokens: int = 128,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Simulate recycled successors alone, copies alone, and copies before recycled successors."""
    checkpoint = load_checkpoint(model, device="cpu", dtype=dtype)
    wrapped = LayerSkipModel(checkpoint.model)
    engine = make_engine(wrapped, "auto")
    assert engine.costs is not None
    cost = relative(engine.costs)
    questions = read_suite(suite, per_category)
    prompts = encode_suite(questions, engine, checkpoint.tokenizer, max_new_tokens=max_new_tokens).prompts
    with tempfile.TemporaryDirectory() as folder:
        run = ReferenceRun(wrapped, Path(folder), "")
        found = [run.texts([prompt], max_new_tokens=max_new_tokens, states=1)[0] for prompt in prompts]
    pairs = zip(found, prompts, strict=True)
    texts = [with_successors(wrapped, text, prompt.category) for text, prompt in pairs if text.new_tokens > 1]
    methods = {f"recycling, {size} tokens": (best_tree(texts, size), False) for size in _TREES}
    methods |= {"copies": (set(), True)}
    methods |= {f"copies, else recycling, {size} tokens": (best_tree(texts, size), True) for size in _TREES}
    table = Table("simulated", "mean", *dict.fromkeys(text.category for text in texts), box=None)
    figures: dict[str, dict[str, float]] = {}
    for name, (tree, copies) in methods.items():
        by_category: dict[str, list[float]] = defaultdict(list)
        for text in texts:
            by_category[text.category].append(speedup(text, cost, tree, copies=copies))
        mean = fmean(value for values in by_category.values() for value in values)
        figures[name] = {"mean": mean} | {category: fmean(values) for category, values in by_category.items()}
        table.add_row(name, *(f"{value:.2f}×" for value in figures[name].values()))
    console.print(table)
    write_json(json, {"machine": machine_of(wrapped), "model": model, "figures": figures})


if __name__ == "__main__":
    typer.run(main)
