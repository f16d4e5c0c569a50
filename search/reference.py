"""The reference: the target model's own continuation of each prompt, with what it computed over it.

Decoded once and kept on disk: every trial, every worker and a resumed search read it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from layerskip.model import LayerSkipModel
from layerskip.target_texts import TargetText, TextStore, batch_generate, likeliest, run_keeping_states
from layerskip.utils import digest
from search.prompts import EncodedPrompt

# Prompts decoded in a batch: a pass over so many tokens costs little more than a pass over a single token.
_BATCH = 16
# Positions scored at a time: keeps [positions, vocab_size] small.
CHUNK = 64


class ReferenceRun:
    """Decodes reference texts, or finds those that were decoded earlier.

    Args:
        model: The model.
        folder: Where texts of all models are kept.
        fingerprint: Of the model's weights, as in :class:`layerskip.ModelIdentity`.
        on_progress: Called with how many of the texts asked for so far are there; a text that is being decoded counts
            by the share of its tokens.

    Attributes:
        found: Texts asked for so far that had been decoded earlier.

    Raises:
        LayerSkipError: The folder cannot be written.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        folder: Path,
        fingerprint: str,
        on_progress: Callable[[float], object] = lambda done: None,
    ) -> None:
        self._model = model
        self._store = TextStore(model, fingerprint, folder, "reference")
        self._on_progress = on_progress
        self._done = 0
        self.found = 0

    def texts(
        self, prompts: Sequence[EncodedPrompt], *, max_new_tokens: int, states: int | None = None
    ) -> list[TargetText]:
        """The texts of some prompts, in their order.

        Args:
            prompts: What to continue.
            max_new_tokens: Most tokens for each.
            states: As for :func:`record`.

        Raises:
            LayerSkipError: The folder cannot be written.
        """
        names = [digest([prompt.tokens, max_new_tokens, states]) for prompt in prompts]
        missing = [pair for pair in zip(prompts, names, strict=True) if self._store.find(pair[1]) is None]
        self.found += len(prompts) - len(missing)
        self._done += len(prompts) - len(missing)
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            share = len(batch) / max_new_tokens
            continuations = batch_generate(
                self._model,
                [prompt.tokens for prompt, _ in batch],
                max_new_tokens,
                on_step=partial(self._on_step, share),
            )
            for (prompt, name), new in zip(batch, continuations, strict=True):
                self._store.write(name, [record(self._model, prompt.tokens, new, states=states)])
            self._done += len(batch)
        self._on_progress(self._done)
        return [text for name in names for text in self._store.read(name)]

    def _on_step(self, share: float, new_tokens: int) -> None:
        self._on_progress(self._done + share * new_tokens)


@torch.inference_mode()
def record(
    model: LayerSkipModel, prompt: Sequence[int], new: Sequence[int], *, states: int | None = None
) -> TargetText:
    """Run the target model over a text once and keep what drafts are compared with: keys, values and all boundaries.

    Args:
        model: The model.
        prompt: Token ids.
        new: The target model's continuation.
        states: Positions at which to keep hidden states, evenly spaced over the text; None keeps those at which drafts
            are asked.
    """
    tokens = torch.tensor([*prompt, *new], device=model.device)
    n, asked = len(tokens), slice(len(prompt), len(prompt) + len(new) - 1)
    spaced = torch.linspace(0, n - 1, min(states or n, n)).round().long()
    cache = model.new_cache(n)
    last, kept = run_keeping_states(model, tokens, cache, torch.arange(n)[asked] if states is None else spaced)
    cache.advance(n)
    best = [likeliest(model.logits(part[None])) for part in last[asked].split(CHUNK)]
    layers = [cache.layer(index) for index in range(model.num_layers)]
    return TargetText(
        tokens=tokens,
        prompt_length=len(prompt),
        choices=torch.cat([choices for choices, _ in best]) if best else tokens[:0],
        confidence=torch.cat([confidence for _, confidence in best]) if best else torch.zeros(0),
        states=kept,
        keys=tuple(keys[0] for keys, _ in layers),
        values=tuple(values[0] for _, values in layers),
    )
