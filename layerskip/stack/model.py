"""A decoder whose sublayers can be left out, one forward pass at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerskip.errors import InvalidInputError
from layerskip.stack.families import family_of
from layerskip.stack.kv_cache import KVCache
from layerskip.stack.masks import attention_mask, check_attention_implementation
from layerskip.stack.skipset import SkipSet
from layerskip.stack.sublayers import AttentionSublayer, PassContext, sublayers_of


class LayerSkipModel:
    """A Hugging Face causal language model as a flat stack of ``2 * num_layers`` residual sublayers.

    The wrapper calls the model's own modules and owns only the loop over them, the cache and the skipping. It holds no
    weights and changes nothing in the model, so wrapping costs nothing and the model stays usable as it was.

    Args:
        model: A Llama or Gemma-2 model for causal language modelling, in evaluation mode.

    Raises:
        UnsupportedModelError: The model is of another family, or uses an attention implementation that is neither
            ``eager`` nor ``sdpa``.
        InvalidInputError: The model is in training mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.training:
            raise InvalidInputError("the model is in training mode; call model.eval() first")
        self.hf_model = model
        self.config = model.config
        self.family = family_of(model.config)
        self._attention = check_attention_implementation(model.config._attn_implementation)
        decoder: Any = model.base_model
        self._embed, self._rotary, self._final_norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self._head = model.get_output_embeddings()
        self._logit_cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.sublayers = sublayers_of(decoder.layers, self.family)
        self._windows = {s.window for s in self.sublayers if isinstance(s, AttentionSublayer)}

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, half the number of sublayers."""
        return len(self.sublayers) // 2

    @property
    def context_length(self) -> int:
        """Most positions that the model was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config.vocab_size)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the model's generation config."""
        ids = getattr(self.hf_model.generation_config, "eos_token_id", None)
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        device: torch.device = self._embed.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the hidden states."""
        dtype: torch.dtype = self._embed.weight.dtype
        return dtype

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for this model with room for ``capacity`` positions."""
        return KVCache(self.num_layers, capacity)

    def forward(self, tokens: Tensor, cache: KVCache, skip_set: SkipSet | None = None) -> Tensor:
        """Run new tokens through the stack, behind what the cache holds.

        Args:
            tokens: ``[n]``, token ids.
            cache: Keys and values of the text before; moves forward by ``n``.
            skip_set: Sublayers to leave out; None runs the full model.

        Returns:
            Hidden states after the last sublayer, ``[1, n, hidden_size]``. :meth:`logits` scores them.
        """
        return self.run_sublayers(self._embed(tokens[None]), cache, skip_set)

    def run_sublayers(self, x: Tensor, cache: KVCache, skip_set: SkipSet | None = None, start: int = 0) -> Tensor:
        """Run hidden states through the stack from sublayer ``start`` on, behind what the cache holds.

        Args:
            x: ``[1, n, hidden_size]``, the hidden states before sublayer ``start``.
            cache: Keys and values of the text before; moves forward by ``n``.
            skip_set: Sublayers to leave out; None leaves out none.
            start: Index of the first sublayer to run.

        Returns:
            Hidden states after the last sublayer, ``[1, n, hidden_size]``.
        """
        width = x.shape[1]
        cache.reserve(width)
        context = self._pass_context(x, cache)
        kept: Iterable[int] = range(len(self.sublayers)) if skip_set is None else skip_set.kept
        for index in kept:
            if index >= start:
                x = self.sublayers[index](x, context)
        cache.advance(width)
        return x

    def _pass_context(self, x: Tensor, cache: KVCache) -> PassContext:
        past, width = cache.length, x.shape[1]
        positions = torch.arange(past, past + width, device=x.device)[None]
        masks = {
            window: attention_mask(
                past, width, window=window, implementation=self._attention, dtype=x.dtype, device=x.device
            )
            for window in self._windows
        }
        return PassContext(self._rotary(x, positions), masks, cache)

    def logits(self, x: Tensor) -> Tensor:
        """Score the vocabulary.

        Args:
            x: ``[1, n, hidden_size]``, hidden states after the last sublayer.

        Returns:
            ``[n, vocab_size]``, in float32.
        """
        scores: Tensor = self._head(self._final_norm(x))[0]
        if self._logit_cap is not None:
            scores = torch.tanh(scores / self._logit_cap) * self._logit_cap
        return scores.float()
