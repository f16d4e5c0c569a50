"""The eager engine: passes run module by module, on every device; the reference for every other engine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from layerskip.costs import PassCosts
from layerskip.engine.base import DraftStep, Scored, SharedPrefix
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sublayers import PassContext, Stack
from layerskip.token_tree import MOST_LEAVES, TokenTree


class EagerEngine:
    """Runs every pass module by module.

    Args:
        model: The model.
    """

    name = "eager"
    resumes = True

    def __init__(self, model: LayerSkipModel) -> None:
        self.model = model
        self.passes = model
        self.costs: PassCosts | None = None

    @property
    def captures(self) -> bool:
        return self.model.compiled

    def check_current(self) -> None:
        self.model.check_current()

    def new_cache(self, capacity: int) -> KVCache:
        padding = 0 if self.costs is None else max(self.costs.sublayers) - 1
        return self.model.new_cache(capacity + MOST_LEAVES + padding)

    def can_continue(self, cache: KVCache) -> bool:
        return True

    def prefill(self, tokens: Tensor, cache: KVCache) -> Scored:
        x = self.passes.forward(tokens, cache)
        return Scored(self.passes.logits(x[:, -1:]), x[0])

    def draft_step(self, tokens: Tensor, cache: KVCache, stack: Stack) -> DraftStep:
        with cache.recompute_last(len(tokens) - 1):
            context = self.passes.pass_context(len(tokens), cache)
            shared = stack.run(self.passes.embed(tokens), context, stop=stack.shared)
            x = stack.run(shared, context, start=stack.shared)[:, -1:]
        cache.advance(1)
        prefix = shared[:, -1:] if stack.shared else None
        return DraftStep.of(self.passes.logits(x, stack)[0], stack.token_ids, prefix)

    def verify(
        self, tokens: Tensor, cache: KVCache, shared: SharedPrefix | None = None, tree: TokenTree | None = None
    ) -> Scored:
        needed = len(tokens)
        width = needed if self.costs is None else self.costs.cheapest_width(needed)
        tree = tree or TokenTree.chain(needed - 1)
        if shared is not None and tree.is_chain and self._resuming_pays(width, shared):
            x, start = self._resume(tokens, cache, shared), shared.depth
        else:
            x, start = self.passes.embed(tokens), 0
        if width > needed:
            x = functional.pad(x, (0, 0, 0, width - needed))  # [1, width, hidden_size]
        x = self.passes.target_stack.run(x, self._context(tree, width, cache), start=start)
        cache.advance(needed)
        scored = self._scored(x)
        return Scored(scored.logits[:needed], scored.states[:needed])

    def _context(self, tree: TokenTree, width: int, cache: KVCache) -> PassContext:
        # A chain's context is simpler, and faster where no mask is needed.
        if tree.is_chain:
            return self.passes.pass_context(width, cache)
        return self.passes.tree_context(tree.padded(width), cache)

    def _scored(self, x: Tensor) -> Scored:
        return Scored(self.passes.logits(x), x[0])

    def _resuming_pays(self, width: int, shared: SharedPrefix) -> bool:
        share = shared.depth / len(self.model.sublayers)
        return self.costs is not None and self.costs.saved_by_resuming(width, share) > 0

    def _resume(self, tokens: Tensor, cache: KVCache, shared: SharedPrefix) -> Tensor:
        """Hidden states of all tokens before sublayer ``shared.depth``: only the last one has to be computed."""
        past = cache.length
        cache.advance(len(tokens) - 1)
        context = self.passes.pass_context(1, cache)
        last = self.passes.target_stack.run(self.passes.embed(tokens[-1:]), context, stop=shared.depth)
        cache.rollback(past)
        return torch.cat([shared.states, last], dim=1)
