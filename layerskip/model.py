"""A Hugging Face causal language model as a flat stack of sublayers, any of which a forward pass can skip."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from os import PathLike
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from layerskip.adapters import adapted_model
from layerskip.attention_masks import AttentionMasks, check_attention_implementation
from layerskip.drafting.quantization import QuantizedCopies
from layerskip.errors import InvalidInputError, UnsupportedModelError
from layerskip.families import family_of, setting
from layerskip.kv_cache import KVCache
from layerskip.model_state import ModelState, ModelStateReader, check_honoured, check_in_memory, settings_text
from layerskip.names import Precision
from layerskip.skip_set import SkipSet
from layerskip.sublayers import AttentionSublayer, PassContext, Stack, Step, sublayers_of, weights_of
from layerskip.token_tree import TokenTree, ancestors_on, numbers_on

# Unit vectors put through the head at a time: keeps [vectors, vocab_size] small.
_CHUNK = 256


@torch.no_grad()
def lm_head_rows(head: nn.Module, token_ids: Tensor, like: Tensor) -> Tensor:
    """The rows of an output head, without bias, that score some tokens.

    A quantized head, or one with an adapter, has no such rows to take: its outputs for unit vectors are its weights.

    Args:
        head: The head.
        token_ids: ``[n]``.
        like: ``[..., hidden_size]``, hidden states of the model's dtype.

    Returns:
        ``[n, hidden_size]``, on the head's device.
    """
    device = next(weights_of(head)).device
    token_ids = token_ids.to(device)
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter:
        return head.weight[token_ids]
    units = torch.eye(like.shape[-1], dtype=like.dtype, device=device)
    return torch.cat([head(chunk)[:, token_ids].T for chunk in units.split(_CHUNK)], dim=1)


class LayerSkipModel:
    """A Hugging Face causal language model as a flat stack of ``2 * num_layers`` residual sublayers.

    The wrapper calls the model's own modules and owns only the loop over them, the cache and the skipping. It changes
    nothing in the model and holds no weights but the copies that a draft at lower precision asks for, so wrapping costs
    nothing and the model stays usable as it was. Wrap it anew after its settings or modules were changed.

    On CUDA, cuDNN's attention is switched off for the whole process: it takes tens of milliseconds for each new length.

    Args:
        model: A model for causal language modelling of one of the families in :mod:`layerskip.families`, in
            evaluation mode; also a PEFT model around one, whose active adapters then belong to it.
        for_assistant: Whether only a draft is made of it, and transformers calls the model itself, whatever is attached
            to its layers.

    Attributes:
        copies: The copies of its sublayers and head at lower precision: which precisions it can draft at, and what they
            take of memory.
        compile_backend: What :func:`layerskip.engine.compile_sublayers` has compiled its sublayers with; None if it has
            not.

    Raises:
        UnsupportedModelError: The model is of another family, has no output head, uses an attention implementation that
            is neither ``eager`` nor ``sdpa``, is offloaded, or has an adapter, a hook or the like that acts elsewhere
            than in the modules that are called.
        InvalidInputError: It is not a model, such as a name or another wrapper; or it is in training mode.
    """

    def __init__(self, model: PreTrainedModel | nn.Module, *, for_assistant: bool = False) -> None:
        _check_module(model)
        if model.training:
            raise InvalidInputError("the model is in training mode; call model.eval() first")
        model = adapted_model(model)
        check_in_memory(model)
        self.hf_model = model
        self.config = model.config
        self.family = family_of(model.config)
        if not for_assistant:
            check_honoured(model)
        self._attention = check_attention_implementation(model.config)
        decoder: Any = model.base_model
        self._embed, self._rotary, self._final_norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self._head = _output_head(model)
        self._logit_cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._embedding_multiplier = setting(model.config, self.family.embedding_multiplier)
        self._logits_divisor = setting(model.config, self.family.logits_divisor)
        self.sublayers = sublayers_of(decoder.layers, self.family, model.config)
        self.compile_backend: str | Callable[..., Any] | None = None
        # Heads of draft vocabularies, shared by the drafts that are alive: each is a copy of rows.
        self._partial_heads: WeakValueDictionary[tuple[object, ...], Tensor | nn.Module] = WeakValueDictionary()
        self.copies = QuantizedCopies(self.sublayers, (self.vocab_size, self._embed.weight.shape[1]), self.dtype)
        self.target_stack = Stack(tuple(enumerate(self.sublayers)), shared=len(self.sublayers))
        attention = [sublayer for sublayer in self.sublayers if isinstance(sublayer, AttentionSublayer)]
        self._windows = {sublayer.window for sublayer in attention}
        self._rotary_kinds = {sublayer.rotary for sublayer in attention}
        self._state_reader: ModelStateReader | None = None
        self._outline = self._read_outline()
        if self.device.type == "cuda":
            # cuDNN's attention, PyTorch's first choice on some cards, takes 30 ms for every new length of the text.
            torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def compiled(self) -> bool:
        """Whether its sublayers are compiled."""
        return self.compile_backend is not None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, half the number of sublayers."""
        return len(self.sublayers) // 2

    @property
    def context_length(self) -> int:
        """Most positions of a text."""
        return int(self.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config.vocab_size)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, from the model's generation config."""
        ids = getattr(self.hf_model.generation_config, "eos_token_id", None)
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where token ids go in."""
        device: torch.device = self._embed.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the hidden states."""
        dtype: torch.dtype = self._embed.weight.dtype
        return dtype

    @property
    def bytes_per_position(self) -> int:
        """Bytes of the keys and values of one position, in all layers."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * self.num_layers * heads * dim * self.dtype.itemsize)

    @property
    def head(self) -> nn.Module:
        """Scores the vocabulary; can be replaced by a module that computes the same."""
        head: nn.Module = self._head
        return head

    @head.setter
    def head(self, head: nn.Module) -> None:
        self._head = head

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        norm: nn.Module = self._final_norm
        return norm

    def check_current(self) -> None:
        """Make sure that the model is as it was when it was wrapped, but for the values of its weights.

        Raises:
            InvalidInputError: Its settings or its modules were changed.
            UnsupportedModelError: A hook or the like was attached that would not run.
        """
        check_honoured(self.hf_model)
        settings, modules = self._read_outline()
        for what, now, before in zip(("settings", "modules"), (settings, modules), self._outline, strict=True):
            if now != before:
                raise InvalidInputError(
                    f"the model's {what} were changed after it was wrapped; wrap it anew: LayerSkipModel(model)"
                )

    def _read_outline(self) -> tuple[str, list[int]]:
        """The settings of the model, and ids of the modules that a pass calls."""
        decoder: Any = self.hf_model.base_model
        called = [decoder.embed_tokens, decoder.rotary_emb, decoder.norm, *decoder.layers]
        called += [part for layer in decoder.layers for part in layer.children()]
        return settings_text(self.config), [*map(id, called), id(self.hf_model.get_output_embeddings())]

    def read_state(self) -> ModelState:
        """What the model computes with now: equal to an earlier state if nothing was changed since."""
        if self._state_reader is not None:
            state = self._state_reader.read()
            if state.modules == self._state_reader.modules:
                return state
        self._state_reader = ModelStateReader(self.hf_model)  # which knows modules that were added
        return self._state_reader.read()

    def check_unchanged(self, since: ModelState, what: str, *, but: str | None = None) -> None:
        """Make sure that the model computes with what it did at an earlier state.

        Args:
            since: The state.
            what: What was worked out from it then, human-readable.
            but: A field of the state that does not matter.

        Raises:
            InvalidInputError: It was changed.
        """
        changed = since.differs_in(self.read_state(), but=but)
        if changed is not None:
            raise InvalidInputError(f"{what}: the model's {changed} were changed after it was made; make a new one")

    def note_packed(self) -> None:
        """Take the modules as they are now for those that were wrapped: others compute the same in their place."""
        self._state_reader, self._outline = None, self._read_outline()

    def through(self, steps: Sequence[Step], head: nn.Module, final_norm: nn.Module) -> LayerSkipModel:
        """The same model, whose passes run through other modules that compute the same.

        Args:
            steps: In place of the sublayers, one for each.
            head: In place of the head.
            final_norm: In place of the norm before it.
        """
        other = copy.copy(self)
        other.target_stack = Stack(tuple(enumerate(steps)), shared=len(steps))
        other._head, other._final_norm = head, final_norm
        return other

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for this model with room for ``capacity`` positions."""
        return KVCache(self.num_layers, capacity)

    def stack_of(
        self,
        skip_set: SkipSet,
        *,
        stand_ins: Mapping[int, Step] | None = None,
        token_ids: Tensor | None = None,
        precision: Precision = "full",
    ) -> Stack:
        """The stack of a draft.

        Args:
            skip_set: Sublayers to skip.
            stand_ins: Replacements of runs of skipped sublayers, by the index of the run's first sublayer.
            token_ids: ``[n]``, the tokens that the draft's head scores; None for the whole vocabulary.
            precision: Of the sublayers that are kept, and of the head; below ``full``, copies are made now where they
                are not there yet.

        Raises:
            InvalidInputError: The skip set is for another number of layers, or the model cannot draft at this precision
                here.
        """
        if skip_set.num_layers != self.num_layers:
            raise InvalidInputError(
                f"skip set: is for {skip_set.num_layers} layers, but the model has {self.num_layers}"
            )
        copies = self.copies.sublayers(precision, skip_set.kept)
        stack = Stack.skipping(self.sublayers, skip_set, stand_ins or {}, copies)
        return replace(stack, precision=precision).with_head_of(self.head_of(token_ids, precision))

    def head_of(self, token_ids: Tensor | None = None, precision: Precision = "full") -> Stack:
        """The head of a draft, as a stack without steps.

        Args:
            token_ids: As in :meth:`stack_of`.
            precision: Likewise.

        Raises:
            InvalidInputError: The model cannot draft at this precision here.
        """
        none = Stack((), shared=0, precision=precision)
        if token_ids is None:
            return none if precision == "full" else replace(none, head=self.copies.head(precision, self._head_weight))
        # A change of the model asks for other rows.
        known = precision, sha256(token_ids.cpu().numpy().tobytes()).digest(), self.read_state()
        head = self._partial_heads.get(known)
        if head is None:
            head = lm_head_rows(self._head, token_ids, self._embed.weight)
            head = head if precision == "full" else self.copies.head_of(precision, head)
            self._partial_heads[known] = head
        token_ids = token_ids.to(self.device)
        if isinstance(head, Tensor):
            return replace(none, token_ids=token_ids, lm_head_rows=head)
        return replace(none, token_ids=token_ids, head=head)

    def _head_weight(self) -> Tensor:
        return lm_head_rows(self._head, torch.arange(self.vocab_size), self._embed.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before the first sublayer, ``[1, n, hidden_size]``, of token ids ``[n]``."""
        x: Tensor = self._embed(tokens[None])
        return x if self._embedding_multiplier == 1 else x * self._embedding_multiplier

    def forward(self, tokens: Tensor, cache: KVCache, skip_set: SkipSet | None = None) -> Tensor:
        """Run new tokens through the stack, after the positions in the cache.

        Args:
            tokens: ``[n]``, token ids.
            cache: Keys and values of the text before; moves forward by ``n``.
            skip_set: Sublayers to skip; None runs the target model.

        Returns:
            Hidden states after the last sublayer, ``[1, n, hidden_size]``. :meth:`logits` scores them.
        """
        stack = self.target_stack if skip_set is None else self.stack_of(skip_set)
        context = self.pass_context(len(tokens), cache)
        x = stack.run(self.embed(tokens), context)
        cache.advance(len(tokens))
        return x

    def pass_context(self, width: int, cache: KVCache) -> PassContext:
        """The context of a pass over ``width`` new positions after the cache's; makes room for them."""
        cache.reserve(width)
        past = cache.length
        positions = torch.arange(past, past + width, device=self.device)
        return PassContext(self._rotary_at(positions[None]), self._masks.causal(past, width, self.device), cache)

    def context_at(self, positions: Tensor, length: int, cache: KVCache) -> PassContext:
        """Like :meth:`pass_context`, in fixed shapes: positions on the device, ``[n]``, and ``length`` keys to read."""
        return PassContext(self._rotary_at(positions[None]), self._masks.at(positions, length), cache)

    def tree_context(self, tree: TokenTree, cache: KVCache) -> PassContext:
        """The context of the verification of a tree, whose rows come after the cache's positions; makes room for it."""
        depths, ancestors = numbers_on(tree.depths, self.device), ancestors_on(tree, self.device)
        cache.reserve(len(depths))
        slots = torch.arange(cache.length, cache.length + len(depths), device=self.device)
        return self.tree_context_at(slots, cache.length + depths, ancestors, cache.length + len(depths), cache)

    def tree_context_at(
        self, slots: Tensor, positions: Tensor, ancestors: Tensor, length: int, cache: KVCache
    ) -> PassContext:
        """Like :meth:`tree_context`, in fixed shapes: the tree on the device, and ``length`` keys to read.

        Args:
            slots: ``[n]``, the places of the rows in the cache.
            positions: ``[n]``, their positions in the text.
            ancestors: ``[n, n]``, the ancestors of each row, itself included.
            length: Number of keys.
            cache: Keys and values of the text before.
        """
        masks = self._masks.tree(slots, positions, ancestors, length)
        return PassContext(self._rotary_at(positions[None]), masks, cache)

    def teacher_context(self, positions: Tensor, cache: KVCache) -> PassContext:
        """The context of a teacher-forced pass: every position sees the text before it and, of the new ones, itself.

        Args:
            positions: ``[b, q]``, positions in each of ``b`` texts, in any order.
            cache: Keys and values of the texts' ``n`` positions; the pass writes its own after them.
        """
        return PassContext(self._rotary_at(positions), self._masks.teacher(positions, cache.length), cache)

    @property
    def _masks(self) -> AttentionMasks:
        return AttentionMasks(self._windows, self._attention, self.dtype)

    def _rotary_at(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cosines and sines, ``[b, n, head_dim]``, of positions ``[b, n]``, by layer type."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)  # tells the rotary module dtype and device
        return {
            kind: self._rotary(like, positions) if kind is None else self._rotary(like, positions, kind)
            for kind in self._rotary_kinds
        }

    def logits(self, x: Tensor, stack: Stack | None = None) -> Tensor:
        """Score the vocabulary.

        Args:
            x: ``[1, n, hidden_size]``, hidden states after the last sublayer.
            stack: The draft whose head to score with; None scores the whole vocabulary with the model's own.

        Returns:
            ``[n, vocab_size]``, or a column for each of the stack's tokens; in float32.
        """
        x = self._final_norm(x.to(self._final_norm.weight.device))[0]
        scores = self._scores(x, stack)
        if self._logits_divisor != 1:
            scores = scores / self._logits_divisor
        if self._logit_cap is not None:
            scores = torch.tanh(scores / self._logit_cap) * self._logit_cap
        return scores.float().to(self.device)

    def _scores(self, x: Tensor, stack: Stack | None) -> Tensor:
        """What the head says of hidden states after the final norm, ``[n, hidden_size]``."""
        head = self._head
        if stack is not None and stack.head is not None:
            head = stack.head
        elif stack is not None and stack.lm_head_rows is not None:
            return functional.linear(x.to(stack.lm_head_rows.device), stack.lm_head_rows)
        scores: Tensor = head(x)
        return scores


def _check_module(model: object) -> None:
    if isinstance(model, LayerSkipModel):
        raise InvalidInputError("model: is wrapped already; pass its hf_model")
    if isinstance(model, str | PathLike):
        raise InvalidInputError(
            f"model: expected a loaded model, got the name {str(model)!r}; "
            "load it: layerskip.load_checkpoint(name).model"
        )
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model: expected a Hugging Face model, got {type(model).__name__}")


def _output_head(model: PreTrainedModel) -> Any:
    """The model's output head.

    Raises:
        UnsupportedModelError: It has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: has no output head to score tokens with; load the model with AutoModelForCausalLM"
        )
    return head
