"""Texts that the target model writes, with what it computed over them, kept on disk.

The search traces drafts along them (``search/reference.py``), training learns from them
(``layerskip/training/data.py``). The two differ in their prompts and in what they keep of each text.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from layerskip.errors import LayerSkipError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.utils import cache_write_errors, digest, library_versions, write_bytes_atomically

# Stores of a kind that stay on disk; the least recently used beyond them are removed, unless a process may still run
# that uses them.
_KEPT = 4
_SECONDS_IN_USE = 24 * 3600.0
_WHAT = "the target model's texts"


@dataclass(frozen=True, eq=False)
class TargetText:
    """A prompt with the target model's own continuation, and what the target model computed over it.

    A draft is asked for the next token at the positions of the new tokens but the last, ``m - 1`` of them.

    Args:
        tokens: ``[n]``, the prompt and ``m`` new tokens after it.
        prompt_length: Tokens of the prompt.
        choices: ``[m - 1]``, the target model's most probable token after each position at which a draft is asked.
        confidence: ``[m - 1]``, the probability of that token.
        states: ``[b, p, hidden_size]``, hidden states at ``b`` boundaries between sublayers and ``p`` positions.
        keys: For each layer ``[heads, n, dim]``; empty where they are not kept.
        values: Likewise.
    """

    tokens: Tensor
    prompt_length: int
    choices: Tensor
    confidence: Tensor
    states: Tensor
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()

    @property
    def new_tokens(self) -> int:
        """Number of tokens in the continuation."""
        return len(self.tokens) - self.prompt_length

    @property
    def draft_positions(self) -> slice:
        """The positions at which a draft is asked."""
        return slice(self.prompt_length, len(self.tokens) - 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, in main memory."""
        tensors = {"tokens": self.tokens, "choices": self.choices, "confidence": self.confidence, "states": self.states}
        tensors["prompt_length"] = torch.tensor(self.prompt_length)
        tensors |= {f"keys.{layer}": keys for layer, keys in enumerate(self.keys)}
        tensors |= {f"values.{layer}": values for layer, values in enumerate(self.values)}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TargetText:
        """The text that has these :attr:`tensors`.

        Raises:
            KeyError: One is missing.
        """
        layers = range(sum(name.startswith("keys.") for name in tensors))
        return cls(
            tokens=tensors["tokens"],
            prompt_length=int(tensors["prompt_length"]),
            choices=tensors["choices"],
            confidence=tensors["confidence"],
            states=tensors["states"],
            keys=tuple(tensors[f"keys.{layer}"] for layer in layers),
            values=tuple(tensors[f"values.{layer}"] for layer in layers),
        )


class TextStore:
    """A folder of texts of one model, a file for each call of :meth:`write`.

    Args:
        model: The target model.
        fingerprint: Of its weights, as in :class:`layerskip.ModelIdentity`.
        cache: The folder for all stores.
        kind: What the texts are for; of each kind, the four most recently used stores and those used in the last day
            are kept.
        settings: What else the texts depend on, as values that JSON has.

    Attributes:
        folder: The store's own folder.

    Raises:
        LayerSkipError: The folder cannot be written.
    """

    def __init__(self, model: LayerSkipModel, fingerprint: str, cache: Path, kind: str, *settings: object) -> None:
        key = digest([fingerprint, str(model.dtype), model.device.type, library_versions(), *settings])
        self.folder = cache / f"{kind}-{key}"
        with cache_write_errors(self.folder, _WHAT):
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)
            # Stores alone, and no other folders of that kind of name: the user may have named any folder as the cache.
            stores = cache.glob(f"{kind}-{'[0-9a-f]' * len(key)}")
            for old in sorted(stores, key=_last_used)[:-_KEPT]:
                if _last_used(old) < time.time() - _SECONDS_IN_USE:
                    shutil.rmtree(old, ignore_errors=True)

    def find(self, name: str) -> list[TargetText] | None:
        """The texts written under a name, on disk until used; None if they are not there or not whole."""
        try:
            os.utime(self.folder)
            parts = _by_number(load_file(self._path(name)))
            return [TargetText.from_tensors(parts[number]) for number in range(len(parts))]
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def read(self, name: str) -> list[TargetText]:
        """As :meth:`find`, for texts that were found or written before.

        Raises:
            LayerSkipError: They are gone.
        """
        texts = self.find(name)
        if texts is None:
            raise LayerSkipError(f"{self._path(name)}: removed or damaged by another process; run the same again")
        return texts

    def write(self, name: str, texts: Sequence[TargetText]) -> None:
        """Keep texts under a name.

        Raises:
            LayerSkipError: The folder cannot be written.
        """
        parts = {f"{number}.{part}": t for number, text in enumerate(texts) for part, t in text.tensors.items()}
        with cache_write_errors(self._path(name), _WHAT):
            write_bytes_atomically(self._path(name), save(parts))
            os.utime(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _by_number(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Each text's tensors, by its number in the file."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, part = name.partition(".")
        parts.setdefault(int(number), {})[part] = tensor
    return parts


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # removed by another process just now
        return 0.0


class _StepCallback(StoppingCriteria):  # the hook of generate that is called after every step
    """Calls a function with the number of tokens that each text has got so far, and stops none."""

    def __init__(self, longest_prompt: int, on_step: Callable[[int], object]) -> None:
        self._longest_prompt, self._on_step = longest_prompt, on_step

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._on_step(input_ids.shape[1] - self._longest_prompt)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _nothing(done: int) -> None:
    pass


@torch.inference_mode()
def batch_generate(
    model: LayerSkipModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    on_step: Callable[[int], object] = _nothing,
) -> list[list[int]]:
    """The target model's continuations of several prompts, decoded in one batch by transformers.

    Args:
        model: The model.
        prompts: Token ids.
        max_new_tokens: Most new tokens for each.
        temperature: 0 is greedy; above, tokens are sampled with torch's own random state.
        on_step: Called after each step with the number of new tokens so far.

    Returns:
        The new tokens of each; an end-of-sequence token is the last of them.
    """
    longest = max(map(len, prompts))
    eos = sorted(model.eos_token_ids)
    padding = eos[0] if eos else 0
    rows = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        **(sampled if temperature else {"do_sample": False}),
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=padding,
    )
    out: Tensor = model.hf_model.generate(  # type: ignore[operator]
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([_StepCallback(longest, on_step)]),
    )
    return [_until_end(row[longest:], model.eos_token_ids) for row in out.tolist()]


def _until_end(tokens: list[int], eos: frozenset[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


def run_keeping_states(
    model: LayerSkipModel, tokens: Tensor, cache: KVCache, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the target model over a text and keep its hidden states at every boundary between sublayers.

    Args:
        model: The model.
        tokens: ``[n]``, token ids.
        cache: An empty cache, which gets the text's keys and values; the caller moves it forward.
        positions: ``[p]``, where to keep states, in main memory.

    Returns:
        ``[n, hidden_size]``, the last hidden states of all tokens, and ``[2 * num_layers + 1, p, hidden_size]``, the
        states that were kept, on the model's first device.
    """
    context = model.pass_context(len(tokens), cache)
    x = model.embed(tokens)
    kept = [x[0, positions.to(x.device)]]
    for _, sublayer in model.target_stack.steps:
        x = sublayer(x, context)
        kept.append(x[0, positions.to(x.device)].to(model.device))
    return x[0], torch.stack(kept)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The column of the highest logit in each row, ``[n]``, and its probability, ``[n]``."""
    best = logits.max(-1)
    return best.indices, (best.values - logits.logsumexp(-1)).exp()
