"""How often a draft agrees with the target model: one teacher-forced pass over the reference, without decoding.

At every position the draft sees the target model's keys and values of the text before, and its own at the position
itself. All positions of all texts are independent then, so that one pass over them takes about as long as a prefill.

A trained layer in place of the top remembers: it has keys and values of its own for the whole text. It gets what it
gets in decoding: over the prompt, which drafts see as a text that is known, states that the target model's keys and
values led to; at the positions at which drafts are asked, their own. So it alone runs over each text as a whole.

Source: SWIFT (arXiv 2410.06916) scores candidates by teacher-forced matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from layerskip.model import LayerSkipModel
from layerskip.sublayers import Stack
from layerskip.target_texts import TargetText, likeliest
from search.reference import CHUNK

# Texts of the first look at a candidate; a hopeless one gets no second.
_FIRST_LOOK = 4
_TEXTS_AT_A_TIME = 8
# Bytes of reference that stay in the device's memory; what goes beyond is read from disk for each candidate.
_MEMORY = 4 * 2**30
# Further down no branch of a draft reaches.
LAST_RANK = 64


@dataclass(frozen=True, eq=False)
class Trace:
    """What a draft would propose along one reference text.

    Args:
        ranks: ``[m - 1]``, the place of the target's choice among the draft's tokens, likeliest first: 0 where the
            draft agrees, at most ``LAST_RANK``.
        confidence: ``[m - 1]``, its probability under the draft.
        target_confidence: ``[m - 1]``, the probability that the target model gives to its own choice.
        prompt_length: Tokens of the prompt.
        new_tokens: ``m``, tokens of the continuation.
    """

    ranks: np.ndarray
    confidence: np.ndarray
    target_confidence: np.ndarray
    prompt_length: int
    new_tokens: int

    @property
    def agrees(self) -> np.ndarray:
        """``[m - 1]``, whether the draft's likeliest token is the target model's choice."""
        agrees: np.ndarray = self.ranks == 0
        return agrees


def acceptance(traces: Sequence[Trace]) -> float:
    """The one-step acceptance rate α: the share of positions at which the draft agrees; 1 if there is none."""
    agrees = np.concatenate([trace.agrees for trace in traces])
    return float(agrees.mean()) if len(agrees) else 1.0


class AcceptanceTracer:
    """Scores drafts on reference texts.

    Args:
        model: The model.
        texts: What the target model wrote, with hidden states at the positions at which drafts are asked.
        memory: Bytes of texts that stay in the device's memory.
    """

    def __init__(self, model: LayerSkipModel, texts: Sequence[TargetText], *, memory: int = _MEMORY) -> None:
        self._model = model
        self._parts = [texts[:_FIRST_LOOK]]
        rest = texts[_FIRST_LOOK:]
        self._parts += [rest[i : i + _TEXTS_AT_A_TIME] for i in range(0, len(rest), _TEXTS_AT_A_TIME)]
        self._resident: dict[int, _Batch] = {}
        self._room = memory

    def traces(self, stack: Stack) -> Iterator[list[Trace]]:
        """A draft's traces, some texts at a time, so that a hopeless draft need not be followed to the end."""
        for number in range(len(self._parts)):
            yield self._batch(number).traces(self._model, stack)

    @property
    def texts(self) -> list[TargetText]:
        """The texts, in the order in which they are looked at."""
        return list(chain.from_iterable(self._parts))

    @property
    def num_texts(self) -> int:
        """Number of texts."""
        return sum(map(len, self._parts))

    def versions(self) -> Versions:
        """The longest of the first texts, to be taken through the stack in several versions."""
        longest = max(self._parts[0], key=lambda text: text.new_tokens)
        return Versions(self._model, _Batch(self._model, [longest]))

    def _batch(self, number: int) -> _Batch:
        if number in self._resident:
            return self._resident[number]
        batch = _Batch(self._model, self._parts[number])
        if batch.nbytes <= self._room:
            self._room -= batch.nbytes
            self._resident[number] = batch
        return batch


class Versions:
    """One text whose hidden states can take several ways up the stack.

    Args:
        model: The model.
        batch: The text.
    """

    def __init__(self, model: LayerSkipModel, batch: _Batch) -> None:
        self._model = model
        self._batch = batch

    @property
    def states(self) -> Tensor:
        """``[2 * num_layers + 1, n, hidden_size]``, the target model's at every boundary."""
        return self._batch.states[:, 0]

    @torch.inference_mode()
    def run_sublayer(self, index: int, x: Tensor) -> Tensor:
        """One sublayer on several versions of the text's states, ``[versions, n, hidden_size]``."""
        sublayer, context = self._model.sublayers[index], self._batch.context
        return torch.cat([sublayer(version[None], context) for version in x])


class _Batch:
    """Some reference texts, padded to one length, ready for passes of any stack.

    Args:
        model: The model.
        texts: ``b`` texts, of at most ``n`` tokens, at most ``q`` of them positions at which drafts are asked.
    """

    @torch.inference_mode()
    def __init__(self, model: LayerSkipModel, texts: Sequence[TargetText]) -> None:
        self._texts = texts
        asked = [torch.arange(text.prompt_length, len(text.tokens) - 1) for text in texts]
        width = max(1, *map(len, asked))  # modules refuse passes over nothing
        length = max(len(text.tokens) for text in texts)
        positions = _padded(asked, width).to(model.device)  # [b, q]
        self.valid = (torch.arange(width) < torch.tensor([[len(one)] for one in asked])).to(model.device)  # [b, q]
        longest_prompt = max(text.prompt_length for text in texts)
        self._prompts = _padded([t.tokens[: t.prompt_length].to(model.device) for t in texts], longest_prompt)  # [b, p]
        self.states = torch.stack([functional.pad(t.states, (0, 0, 0, width - t.states.shape[1])) for t in texts], 1)
        self.states = self.states.to(model.device)  # [boundaries, b, q, hidden_size]
        self._choices = torch.cat([text.choices for text in texts]).to(model.device)
        cache = model.new_cache(length + width)
        for layer in range(model.num_layers):
            past = ([text.keys[layer] for text in texts], [text.values[layer] for text in texts])
            device = model.sublayers[2 * layer].device
            keys, values = (torch.stack([_longer(kv, length) for kv in part]).to(device) for part in past)
            cache.update(keys, values, layer)
        cache.advance(length)  # never moves again: what a draft writes behind it is its own key and value
        self.context = model.teacher_context(positions, cache)
        self.nbytes = cache.nbytes + self.states.nbytes

    @torch.inference_mode()
    def traces(self, model: LayerSkipModel, stack: Stack) -> list[Trace]:
        """What a draft would propose along each text.

        Args:
            model: The model.
            stack: The draft's. Where a step of it remembers, nothing of the model's own runs above that.
        """
        top = stack.remembers_from
        # Below its first skipped sublayer the draft is the target model.
        x = stack.run(self.states[stack.shared], self.context, start=stack.shared, stop=top)  # [b, q, hidden_size]
        states = x[self.valid.to(x.device)] if top is None else self._remembering(model, stack, top, x)
        ranks, confidence = ranked(model, stack, states, self._choices)
        lengths = [text.new_tokens - 1 for text in self._texts]
        return [
            Trace(r.numpy(), c.numpy(), text.confidence.cpu().numpy(), text.prompt_length, text.new_tokens)
            for r, c, text in zip(ranks.split(lengths), confidence.split(lengths), self._texts, strict=True)
        ]

    def _remembering(self, model: LayerSkipModel, stack: Stack, top: int, asked: Tensor) -> Tensor:
        """Take each text as a whole through what stands at the top and remembers.

        Args:
            model: The model.
            stack: The draft's.
            top: Index of the first step that remembers.
            asked: ``[b, q, hidden_size]``, the draft's states below it at the positions at which it is asked.

        Returns:
            ``[positions, hidden_size]``, its states at these positions of all texts, one text after the other.
        """
        cache, (texts, width) = self.context.cache, self._prompts.shape
        embedded = model.embed(self._prompts.flatten()).unflatten(1, (texts, width))[0]  # [b, p, hidden_size]
        with cache.recompute_last(cache.length):
            known = stack.run(embedded, model.pass_context(width, cache), stop=top).to(asked.device)
        counts = [max(text.new_tokens - 1, 0) for text in self._texts]
        whole = [
            torch.cat([before[: text.prompt_length], behind[:count]])
            for before, behind, text, count in zip(known, asked, self._texts, counts, strict=True)
        ]
        longest = max(map(len, whole))
        x = torch.stack([functional.pad(one, (0, 0, 0, longest - len(one))) for one in whole])  # [b, n, hidden_size]
        x = stack.run(x, model.pass_context(longest, model.new_cache(longest)), start=top)
        each = zip(x, self._texts, counts, strict=True)
        return torch.cat([one[text.prompt_length : text.prompt_length + count] for one, text, count in each])


def ranked(model: LayerSkipModel, stack: Stack, states: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """What a draft makes of the target model's choices.

    Args:
        model: The model.
        stack: The draft's.
        states: ``[n, hidden_size]``, the draft's hidden states above its stack.
        choices: ``[n]``, the ids that the target model chose there.

    Returns:
        The ranks of the choices among the draft's tokens, ``[n]``, and the probability of its likeliest, ``[n]``; in
        main memory.
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


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack([functional.pad(row, (0, width - len(row))) for row in rows])


def _longer(past: Tensor, length: int) -> Tensor:
    """Keys or values of one text, ``[heads, n, dim]``, padded to ``length`` positions that nobody looks at."""
    return functional.pad(past, (0, 0, 0, length - past.shape[1]))
