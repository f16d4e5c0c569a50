"""A decoder whose sublayers can be left out, one forward pass at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from layerskip.engine.eager import EagerEngine
from layerskip.engine.interface import Engine
from layerskip.errors import InvalidInputError, UnsupportedModelError
from layerskip.stack.adapters import adapted_model
from layerskip.stack.families import family_of, setting
from layerskip.stack.heads import head_rows
from layerskip.stack.kv_cache import KVCache
from layerskip.stack.masks import (
    attention_mask,
    check_attention_implementation,
    mask_at,
    teacher_mask,
    tree_mask,
)
from layerskip.stack.skipset import SkipSet
from layerskip.stack.stack import Stack, Step, keep
from layerskip.stack.sublayers import AttentionSublayer, PassContext, sublayers_of
from layerskip.stack.tree import Tree, ancestors_on, numbers_on


class LayerSkipModel:
    """A Hugging Face causal language model as a flat stack of ``2 * num_layers`` residual sublayers.

    The wrapper calls the model's own modules and owns only the loop over them, the cache and the skipping. It holds no
    weights and changes nothing in the model, so wrapping costs nothing and the model stays usable as it was.

    Args:
        model: A model for causal language modelling of one of the families in :mod:`layerskip.stack.families`, in
            evaluation mode; also a PEFT model around one, whose active adapters then belong to it.

    Attributes:
        engine: How its passes run; eager unless you set another.
        compiled: Whether :func:`layerskip.engine.compile_sublayers` has compiled its sublayers.

    Raises:
        UnsupportedModelError: The model is of another family, has no output head, uses an attention implementation that
            is neither ``eager`` nor ``sdpa``, or has an adapter that is more than modules in place of others.
        InvalidInputError: It is no model, such as its name or another wrapper; or it is in training mode.
    """

    def __init__(self, model: PreTrainedModel | nn.Module) -> None:
        _check_module(model)
        if model.training:
            raise InvalidInputError("the model is in training mode; call model.eval() first")
        model = adapted_model(model)
        self.hf_model = model
        self.config = model.config
        self.family = family_of(model.config)
        self._attention = check_attention_implementation(model.config._attn_implementation)
        decoder: Any = model.base_model
        self._embed, self._rotary, self._final_norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self._head = _output_head(model)
        self._logit_cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._embedding_multiplier = setting(model.config, self.family.embedding_multiplier)
        self._logits_divisor = setting(model.config, self.family.logits_divisor)
        self.sublayers = sublayers_of(decoder.layers, self.family, model.config)
        self.engine: Engine = EagerEngine(self)
        self.compiled = False
        self.full_stack = Stack(tuple(enumerate(self.sublayers)), shared=len(self.sublayers))
        attention = [sublayer for sublayer in self.sublayers if isinstance(sublayer, AttentionSublayer)]
        self._windows = {sublayer.window for sublayer in attention}
        self._rotary_kinds = {sublayer.rotary for sublayer in attention}

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

    def stack_of(
        self,
        skip_set: SkipSet,
        *,
        stand_ins: Mapping[int, Step] | None = None,
        token_ids: Tensor | None = None,
    ) -> Stack:
        """The stack of a draft.

        Args:
            skip_set: Sublayers to leave out.
            stand_ins: What runs instead of a run of them, by the index of the run's first sublayer.
            token_ids: ``[n]``, the tokens that the draft's head scores; None for the whole vocabulary.

        Raises:
            InvalidInputError: The skip set is for another number of layers.
        """
        if skip_set.num_layers != self.num_layers:
            raise InvalidInputError(
                f"skip set: is for {skip_set.num_layers} layers, but the model has {self.num_layers}"
            )
        stack = keep(self.sublayers, skip_set, stand_ins or {})
        if token_ids is None:
            return stack
        rows = head_rows(self._head, token_ids, self._embed.weight)
        return replace(stack, token_ids=token_ids.to(self.device), head_rows=rows)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before the first sublayer, ``[1, n, hidden_size]``, of token ids ``[n]``."""
        x: Tensor = self._embed(tokens[None])
        return x if self._embedding_multiplier == 1 else x * self._embedding_multiplier

    def forward(self, tokens: Tensor, cache: KVCache, skip_set: SkipSet | None = None) -> Tensor:
        """Run new tokens through the stack, behind what the cache holds.

        Args:
            tokens: ``[n]``, token ids.
            cache: Keys and values of the text before; moves forward by ``n``.
            skip_set: Sublayers to leave out; None runs the full model.

        Returns:
            Hidden states after the last sublayer, ``[1, n, hidden_size]``. :meth:`logits` scores them.
        """
        stack = self.full_stack if skip_set is None else self.stack_of(skip_set)
        context = self.pass_context(len(tokens), cache)
        x = stack.run(self.embed(tokens), context)
        cache.advance(len(tokens))
        return x

    def context_at(self, positions: Tensor, length: int, cache: KVCache) -> PassContext:
        """Like :meth:`pass_context`, in fixed shapes: positions on the device, ``[n]``, and ``length`` keys to read."""
        masks = {
            window: mask_at(positions, length, window=window, implementation=self._attention, dtype=self.dtype)
            for window in self._windows
        }
        return PassContext(self._rotary_at(positions[None]), masks, cache)

    def tree_context(self, tree: Tree, cache: KVCache) -> PassContext:
        """What a verification of a tree shares; makes room for it.

        Args:
            tree: The shape of the ``n`` rows behind what the cache holds.
            cache: Keys and values of the text before.
        """
        depths, ancestors = numbers_on(tree.depths, self.device), ancestors_on(tree, self.device)
        cache.reserve(len(depths))
        slots = torch.arange(cache.length, cache.length + len(depths), device=self.device)
        return self.tree_context_at(slots, cache.length + depths, ancestors, cache.length + len(depths), cache)

    def tree_context_at(
        self, slots: Tensor, positions: Tensor, ancestors: Tensor, length: int, cache: KVCache
    ) -> PassContext:
        """Like :meth:`tree_context`, in fixed shapes: the tree on the device, and ``length`` keys to read.

        Args:
            slots: ``[n]``, where in the cache the rows are.
            positions: ``[n]``, their positions in the text.
            ancestors: ``[n, n]``, which rows each comes from, itself included.
            length: Number of keys.
            cache: Keys and values of the text before.
        """
        masks: dict[int | None, Tensor | None] = {
            window: tree_mask(
                slots,
                positions,
                ancestors,
                length,
                window=window,
                implementation=self._attention,
                dtype=self.dtype,
            )
            for window in self._windows
        }
        return PassContext(self._rotary_at(positions[None]), masks, cache)

    def teacher_context(self, positions: Tensor, cache: KVCache) -> PassContext:
        """What a teacher-forced pass shares: every position sees the texts before it and, of the new ones, itself.

        Args:
            positions: ``[b, q]``, positions in each of ``b`` texts, in any order.
            cache: Keys and values of the texts' ``n`` positions; the pass writes its own behind them.
        """
        masks = {
            window: teacher_mask(
                positions, cache.length, window=window, implementation=self._attention, dtype=self.dtype
            )
            for window in self._windows
        }
        return PassContext(self._rotary_at(positions), masks, cache)

    def _rotary_at(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cosines and sines, ``[b, n, head_dim]``, of positions ``[b, n]``, by layer type."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)  # tells the rotary module dtype and device
        return {
            kind: self._rotary(like, positions) if kind is None else self._rotary(like, positions, kind)
            for kind in self._rotary_kinds
        }

    def pass_context(self, width: int, cache: KVCache) -> PassContext:
        """What a pass of ``width`` new positions behind what the cache holds shares; makes room for them."""
        cache.reserve(width)
        past = cache.length
        masks = {
            window: attention_mask(
                past, width, window=window, implementation=self._attention, dtype=self.dtype, device=self.device
            )
            for window in self._windows
        }
        positions = torch.arange(past, past + width, device=self.device)[None]
        return PassContext(self._rotary_at(positions), masks, cache)

    def logits(self, x: Tensor, stack: Stack | None = None) -> Tensor:
        """Score the vocabulary.

        Args:
            x: ``[1, n, hidden_size]``, hidden states after the last sublayer.
            stack: The draft whose tokens to score; None scores the whole vocabulary.

        Returns:
            ``[n, vocab_size]``, or a column for each of the stack's tokens; in float32.
        """
        x = self._final_norm(x.to(self._final_norm.weight.device))[0]
        rows = None if stack is None else stack.head_rows
        scores: Tensor = self._head(x) if rows is None else functional.linear(x.to(rows.device), rows)
        if self._logits_divisor != 1:
            scores = scores / self._logits_divisor
        if self._logit_cap is not None:
            scores = torch.tanh(scores / self._logit_cap) * self._logit_cap
        return scores.float().to(self.device)


def _check_module(model: object) -> None:
    if isinstance(model, LayerSkipModel):
        raise InvalidInputError("model: is wrapped already; give what it wraps, its hf_model")
    if isinstance(model, str | PathLike):
        raise InvalidInputError(
            f"model: expected a loaded model, got the name {str(model)!r}; "
            "load it: layerskip.load_checkpoint(name).model"
        )
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model: expected a Hugging Face model, got {type(model).__name__}")


def _output_head(model: PreTrainedModel) -> Any:
    """What scores the vocabulary.

    Raises:
        UnsupportedModelError: The model has nothing that does.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: has no output head to score tokens with; load the model with AutoModelForCausalLM"
        )
    return head
