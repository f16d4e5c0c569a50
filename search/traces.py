"""Traces: what a draft would propose along a text that the target model wrote, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerskip.drafting.config import PromptLookup
from layerskip.drafting.head_drafter import through_layer
from layerskip.drafting.prompt_lookup import copied
from layerskip.drafting.suffix_automaton import SuffixAutomaton
from layerskip.drafting.weights import DraftWeights
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.prefix_cache import common_prefix_length
from layerskip.skip_set import SkipSet
from layerskip.sublayers import Stack
from layerskip.target_texts import TargetText, likeliest
from search.reference import CHUNK

Ints = NDArray[np.int_]

# No token tree uses a rank beyond this.
LAST_RANK = 64
# Stack drafts have no maximum length.
_ANY_LENGTH = 1024


@dataclass(frozen=True, eq=False)
class Trace:
    """What a draft would propose along one text, where the text so far is as the draft proposed it.

    A draft from new token ``t`` has its place ``p`` at position ``t + p``. Draft heads propose differently at each of
    their places. A stack's prediction does not depend on the place: all rows are equal.

    How far Hydra's drafts continue after a wrong token is not in a trace; what is accepted of a draft is.

    Args:
        ranks: ``[places, m - 1]``, the rank of the target's choice at each position among the draft's tokens, most
            probable first, by place of the draft; at most ``LAST_RANK``.
        confidence: ``[places, m - 1]``, the probability of the draft's most probable token.
        target_confidence: ``[m - 1]``, the probability that the target model gives to its own choice.
        prompt_length: Tokens of the prompt.
        new_tokens: ``m``, tokens of the continuation.
    """

    ranks: NDArray[np.int_]
    confidence: NDArray[np.float64]
    target_confidence: NDArray[np.float64]
    prompt_length: int
    new_tokens: int

    @classmethod
    def of_stack(cls, ranks: Tensor, confidence: Tensor, text: TargetText) -> Trace:
        """The trace of a draft of the stack, from ranks and confidences ``[m - 1]`` by position."""
        ranks_by_place, confidence_by_place = (
            np.broadcast_to(row.numpy(), (_ANY_LENGTH, len(row))) for row in (ranks, confidence)
        )
        target_confidence = text.confidence.cpu().numpy()
        return cls(ranks_by_place, confidence_by_place, target_confidence, text.prompt_length, text.new_tokens)

    @property
    def places(self) -> int:
        """The longest draft."""
        return len(self.ranks)

    @property
    def agrees(self) -> NDArray[np.bool_]:
        """``[m - 1]``, whether the first token of a draft is the target model's choice."""
        agrees: NDArray[np.bool_] = self.ranks[0] == 0
        return agrees


def acceptance(traces: Sequence[Trace]) -> float:
    """The one-step acceptance rate α: the share of positions at which the draft agrees; 1 if there is none."""
    agrees = np.concatenate([trace.agrees for trace in traces])
    return float(agrees.mean()) if len(agrees) else 1.0


def ranked(model: LayerSkipModel, stack: Stack, states: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the target model's choices among a draft's tokens.

    Args:
        model: The model.
        stack: The draft's.
        states: ``[n, hidden_size]``, the draft's last hidden states.
        choices: ``[n]``, the tokens that the target model chose there.

    Returns:
        The ranks, ``[n]``, and the probability of the draft's most probable token, ``[n]``; in main memory.
    """
    columns = torch.arange(model.vocab_size, device=model.device)
    if stack.token_ids is not None:
        columns = torch.full_like(columns, -1).index_copy_(0, stack.token_ids, columns[: len(stack.token_ids)])
    ranks, confidences = [], []
    for part, wanted in zip(states.split(CHUNK), columns[choices.to(model.device)].split(CHUNK), strict=True):
        logits = model.logits(part[None], stack)  # [n, columns]
        best, confidence = likeliest(logits)
        own = logits.gather(1, wanted.clamp(min=0)[:, None])
        rank = (logits > own).sum(-1).clamp(1, LAST_RANK).masked_fill(wanted < 0, LAST_RANK)
        ranks.append(rank.masked_fill(best == wanted, 0))  # of equal logits the first is proposed
        confidences.append(confidence)
    return torch.cat(ranks).cpu(), torch.cat(confidences).float().cpu()


@torch.inference_mode()
def trace_early_exit(model: LayerSkipModel, stack: Stack, texts: Sequence[TargetText]) -> list[Trace]:
    """The traces of a draft with an early exit: one pass over each text, for it attends to nothing but its own.

    Args:
        model: The model.
        stack: The draft's: the model's own sublayers up to the exit, and what was trained in place of the others.
        texts: The texts.
    """

    def trace(text: TargetText) -> Trace:
        tokens = text.tokens.to(model.device)
        n = len(tokens)
        x = stack.run(model.embed(tokens), model.pass_context(n, model.new_cache(n)))
        return Trace.of_stack(*ranked(model, stack, x[0, text.prompt_length : n - 1], text.choices), text)

    return [trace(text) for text in texts]


@torch.inference_mode()
def trace_heads(model: LayerSkipModel, weights: DraftWeights, texts: Sequence[TargetText]) -> list[Trace]:
    """The traces of draft heads: one pass of the target model over each text.

    Args:
        model: The model.
        weights: The heads, with the layer before them and the draft vocabulary if they have any, on the model's device
            and in its dtype.
        texts: The texts.
    """
    heads = weights.heads
    assert heads is not None
    stack = model.stack_of(SkipSet(model.num_layers), token_ids=weights.token_ids)

    def trace(text: TargetText) -> Trace:
        tokens, first = text.tokens.to(model.device), text.prompt_length
        states = model.forward(tokens, model.new_cache(len(tokens)))[0].to(model.device)
        if weights.prefix_layer is not None:
            states = through_layer(model, weights.prefix_layer, states, KVCache(num_layers=0, capacity=len(tokens)))
        embedded = model.embed(tokens)[0]
        ranks = np.full((heads.count, text.new_tokens - 1), LAST_RANK)
        confidence = np.ones(ranks.shape)
        for place in range(min(heads.count, text.new_tokens - 1)):
            count = text.new_tokens - 1 - place  # new tokens from which a draft has this place inside the text
            known = embedded[first : first + count + place].unfold(0, place + 1, 1).transpose(1, 2)
            answers = heads.at(place, states[first - 1 : first - 1 + count], known)
            ranks[place, place:], confidence[place, place:] = ranked(model, stack, answers, text.choices[place:])
        return Trace(ranks, confidence, text.confidence.cpu().numpy(), first, text.new_tokens)

    return [trace(text) for text in texts]


@dataclass(frozen=True, eq=False)
class LookupTrace:
    """What prompt lookup would copy along one text, after each new token and ``k`` tokens that were drafted rightly.

    Args:
        copied: ``[m, k + 1]``, how many tokens would be proposed, by the number of drafted tokens before them.
        accepted: ``[m, k + 1]``, how many of them are what the target model wrote.
    """

    copied: NDArray[np.int_]
    accepted: NDArray[np.int_]


def trace_lookups(
    lookups: Sequence[PromptLookup], texts: Sequence[TargetText], places: int
) -> dict[PromptLookup, list[LookupTrace]]:
    """The traces of several settings of prompt lookup along several texts.

    Args:
        lookups: When to copy, and how much.
        texts: The texts.
        places: ``k``, tokens of the longest draft that copies continue.
    """
    longest = max((lookup.length for lookup in lookups), default=0)
    matches = [_trace_matches(text, places, longest) for text in texts] if lookups else []
    return {lookup: [_trace_lookup(lookup, *found) for found in matches] for lookup in lookups}


def _trace_matches(text: TargetText, places: int, longest: int) -> tuple[Ints, Ints]:
    """``[m, k + 1]``, how long the matches are from which would be copied, and how many tokens after them are right."""
    tokens, known = text.tokens.tolist(), SuffixAutomaton()
    known.extend(tokens[: text.prompt_length])
    lengths, right = np.zeros((2, text.new_tokens, places + 1), dtype=int)
    for row in range(text.new_tokens):
        newest = text.prompt_length + row
        known.extend(tokens[newest : newest + 1])
        for drafted in range(min(places, text.new_tokens - 1 - row) + 1):
            following = newest + 1 + drafted
            draft = tokens[newest + 1 : following]
            match = known.match_after(draft) if draft else known.match
            lengths[row, drafted] = match.length
            right[row, drafted] = common_prefix_length(copied(known, match, longest, draft), tokens[following:])
    return lengths, right


def _trace_lookup(lookup: PromptLookup, lengths: Ints, right: Ints) -> LookupTrace:
    room = np.maximum(lookup.length - np.arange(lengths.shape[1]), 0)  # by drafted tokens
    count = np.where(lengths >= lookup.shortest, np.minimum(lookup.per_match * lengths, room), 0)
    return LookupTrace(count, np.minimum(count, right))
