"""The reference run: what the target model writes behind each prompt, and what it computed on the way.

Decoded once, and kept on disk: every trial, every worker and a search that goes on reads it from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from layerskip.model import LayerSkipModel
from layerskip.training.data import batch_generate
from layerskip.utils import cache_write_errors, library_versions, write_bytes_atomically
from search.prompts import EncodedPrompt

# Prompts decoded side by side: a pass over so many tokens costs little more than one over a single token.
_SIDE_BY_SIDE = 16
# Positions scored at a time: keeps [positions, vocab_size] small.
CHUNK = 64
# References kept on disk; the least recently used beyond them are removed.
_KEPT = 4
_WHAT = "the reference run"


@dataclass(frozen=True, eq=False)
class ReferenceText:
    """A prompt with the target model's own continuation, and what the target model computed over it.

    Drafts are asked at the positions of the new tokens but the last, ``m - 1`` of them: there they would propose the
    next.

    Args:
        tokens: ``[n]``, the prompt and ``m`` new tokens behind it.
        prompt_length: Tokens of the prompt.
        choices: ``[m - 1]``, the target model's likeliest token behind each of these positions.
        confidence: ``[m - 1]``, its probability.
        keys: For each layer ``[heads, n, dim]``.
        values: Likewise.
        states: ``[2 * num_layers + 1, p, hidden_size]``, hidden states at every boundary between sublayers, at some
            ``p`` positions: with ``p = m - 1`` those at which drafts are asked.
    """

    tokens: Tensor
    prompt_length: int
    choices: Tensor
    confidence: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    states: Tensor

    @property
    def new_tokens(self) -> int:
        """Number of tokens in the continuation."""
        return len(self.tokens) - self.prompt_length

    def to_bytes(self) -> bytes:
        """The content of a safetensors file."""
        tensors = {f"keys.{i}": keys for i, keys in enumerate(self.keys)}
        tensors |= {f"values.{i}": values for i, values in enumerate(self.values)}
        tensors |= {"tokens": self.tokens, "choices": self.choices, "confidence": self.confidence}
        tensors |= {"states": self.states, "prompt_length": torch.tensor(self.prompt_length)}
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_file(cls, path: Path) -> ReferenceText:
        """Read what :meth:`to_bytes` gave; the tensors stay on disk until they are used.

        Raises:
            ValueError: The file is something else.
            OSError: It cannot be read.
        """
        try:
            tensors = load_file(path)
            layers = range(sum(name.startswith("keys.") for name in tensors))
            return cls(
                tokens=tensors["tokens"],
                prompt_length=int(tensors["prompt_length"]),
                choices=tensors["choices"],
                confidence=tensors["confidence"],
                keys=tuple(tensors[f"keys.{i}"] for i in layers),
                values=tuple(tensors[f"values.{i}"] for i in layers),
                states=tensors["states"],
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not a reference text: {error}") from error


class ReferenceRun:
    """Makes reference texts, or finds those that were made earlier.

    Args:
        model: The model.
        folder: Where references of all models are kept.
        fingerprint: Of the model's weights, as in :class:`layerskip.fingerprint.ModelIdentity`.

    Attributes:
        found: Texts asked for so far that had been made earlier.

    Raises:
        LayerSkipError: The folder cannot be written.
    """

    def __init__(self, model: LayerSkipModel, folder: Path, fingerprint: str) -> None:
        self._model = model
        self.found = 0
        what = [fingerprint, str(model.dtype), model.device.type, library_versions()]
        self._folder = folder / f"reference-{_digest(what)}"
        with cache_write_errors(self._folder, _WHAT):
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)
            for old in sorted(folder.glob("reference-*"), key=_last_used)[:-_KEPT]:
                shutil.rmtree(old, ignore_errors=True)

    def texts(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        max_new_tokens: int,
        states: int | None = None,
    ) -> list[ReferenceText]:
        """The texts of some prompts, in their order.

        Args:
            prompts: What to continue.
            max_new_tokens: Most tokens for each.
            states: Positions at which to keep hidden states, evenly spaced over each text; None keeps those at which
                drafts are asked.

        Raises:
            LayerSkipError: The folder cannot be written.
        """
        paths = [self._folder / f"{_digest([p.tokens, max_new_tokens, states])}.safetensors" for p in prompts]
        missing = [pair for pair in zip(prompts, paths, strict=True) if _read(pair[1]) is None]
        self.found += len(prompts) - len(missing)
        for start in range(0, len(missing), _SIDE_BY_SIDE):
            batch = missing[start : start + _SIDE_BY_SIDE]
            written = batch_generate(self._model, [prompt.tokens for prompt, _ in batch], max_new_tokens)
            for (prompt, path), new in zip(batch, written, strict=True):
                text = record(self._model, prompt.tokens, new, states=states)
                with cache_write_errors(path, _WHAT):
                    write_bytes_atomically(path, text.to_bytes())
        return [ReferenceText.from_file(path) for path in paths]


@torch.inference_mode()
def record(
    model: LayerSkipModel, prompt: Sequence[int], new: Sequence[int], *, states: int | None = None
) -> ReferenceText:
    """Run the target model over a text once and keep what drafts are held against.

    Args:
        model: The model.
        prompt: Token ids.
        new: The target model's continuation.
        states: As in :meth:`ReferenceRun.texts`.
    """
    tokens = torch.tensor([*prompt, *new], device=model.device)
    n, asked = len(tokens), slice(len(prompt), len(prompt) + len(new) - 1)
    all_over = torch.linspace(0, n - 1, min(states or n, n)).round().long()
    positions = torch.arange(n)[asked] if states is None else all_over
    cache = model.new_cache(n)
    context = model.pass_context(n, cache)
    x = model.embed(tokens)  # [1, n, hidden_size]
    boundaries = [x[0, positions]]
    for _, sublayer in model.target_stack.steps:
        x = sublayer(x, context)
        boundaries.append(x[0, positions.to(x.device)].to(model.device))
    cache.advance(n)
    best = [likeliest(model.logits(part[None])) for part in x[0, asked].split(CHUNK)]
    layers = [cache.layer(index) for index in range(model.num_layers)]
    return ReferenceText(
        tokens=tokens,
        prompt_length=len(prompt),
        choices=torch.cat([choices for choices, _ in best]) if best else tokens[:0],
        confidence=torch.cat([confidence for _, confidence in best]) if best else torch.zeros(0),
        keys=tuple(keys[0] for keys, _ in layers),
        values=tuple(values[0] for _, values in layers),
        states=torch.stack(boundaries),
    )


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The column of the highest logit in each row, ``[n]``, and its probability, ``[n]``."""
    best = logits.max(-1)
    return best.indices, (best.values - logits.logsumexp(-1)).exp()


def _read(path: Path) -> ReferenceText | None:
    try:
        return ReferenceText.from_file(path)
    except (OSError, ValueError):  # not there, or not whole
        return None


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # removed by another process just now
        return 0.0


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
