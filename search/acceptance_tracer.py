"""Acceptance tracer: how often a draft agrees with the target model, by one teacher-forced pass over reference texts.

At every position the draft attends to the target model's keys and values of the text before, and to its own at the
position itself. So all positions of all texts are independent, and one pass over them takes about as long as a prefill.

A draft layer has keys and values of its own for the whole text. It gets what it gets in decoding: over the prompt, the
states that the draft's lower sublayers compute with the target model's keys and values; at the positions at which
drafts are asked, their own. So it alone runs over each text as a whole.

Source: SWIFT (arXiv 2410.06916) scores candidates by teacher-forced matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from layerskip.model import LayerSkipModel
from layerskip.sublayers import Stack
from layerskip.target_texts import TargetText
from search.traces import Trace, ranked

# Texts that a candidate is traced on first; one that cannot win is traced on no others.
_FIRST_TEXTS = 4
_TEXTS_AT_A_TIME = 8
# Bytes of texts that stay in the device's memory; what goes beyond is brought there for each candidate.
_MEMORY = 4 * 2**30


class AcceptanceTracer:
    """Traces drafts along reference texts.

    Args:
        model: The model.
        texts: What the target model wrote, with hidden states at the positions at which drafts are asked.
        memory: Bytes of texts that stay in the device's memory.
    """

    def __init__(self, model: LayerSkipModel, texts: Sequence[TargetText], *, memory: int = _MEMORY) -> None:
        self._model = model
        self._parts = [texts[:_FIRST_TEXTS]]
        rest = texts[_FIRST_TEXTS:]
        self._parts += [rest[i : i + _TEXTS_AT_A_TIME] for i in range(0, len(rest), _TEXTS_AT_A_TIME)]
        self._resident: dict[int, _Batch] = {}
        self._room = memory

    def trace(self, stack: Stack) -> Iterator[list[Trace]]:
        """A draft's traces, some texts at a time: one that cannot win need not be traced along all of them."""
        for number in range(len(self._parts)):
            yield self._batch(number).trace(self._model, stack)

    @property
    def texts(self) -> list[TargetText]:
        """The texts, in the order in which drafts are traced along them."""
        return list(chain.from_iterable(self._parts))

    @property
    def num_texts(self) -> int:
        """Number of texts."""
        return sum(map(len, self._parts))

    def sublayer_runner(self) -> SublayerRunner:
        """The longest of the first texts, to be run through the stack in several versions."""
        longest = max(self._parts[0], key=lambda text: text.new_tokens)
        return SublayerRunner(self._model, _Batch(self._model, [longest]))

    def _batch(self, number: int) -> _Batch:
        if number in self._resident:
            return self._resident[number]
        batch = _Batch(self._model, self._parts[number])
        if batch.nbytes <= self._room:
            self._room -= batch.nbytes
            self._resident[number] = batch
        return batch


class SublayerRunner:
    """One text whose hidden states are run through parts of the stack in several versions.

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
        counts = torch.tensor([[len(row)] for row in asked])
        self.valid = (torch.arange(width) < counts).to(model.device)  # [b, q]
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
        cache.advance(length)  # never moves again: what a draft writes after it is its own key and value
        self.context = model.teacher_context(positions, cache)
        self.nbytes = cache.nbytes + self.states.nbytes

    @torch.inference_mode()
    def trace(self, model: LayerSkipModel, stack: Stack) -> list[Trace]:
        """A draft's trace along each text.

        Args:
            model: The model.
            stack: The draft's. Above a step with keys and values of its own, none of the model's own runs.
        """
        top = stack.remembers_from
        # Below its first skipped sublayer the draft is the target model.
        x = stack.run(self.states[stack.shared], self.context, start=stack.shared, stop=top)  # [b, q, hidden_size]
        states = x[self.valid.to(x.device)] if top is None else self._over_whole_texts(model, stack, top, x)
        ranks, confidence = ranked(model, stack, states, self._choices)
        lengths = [text.new_tokens - 1 for text in self._texts]
        return [
            Trace.of_stack(r, c, text)
            for r, c, text in zip(ranks.split(lengths), confidence.split(lengths), self._texts, strict=True)
        ]

    def _over_whole_texts(self, model: LayerSkipModel, stack: Stack, top: int, asked: Tensor) -> Tensor:
        """Run a draft layer over each text as a whole.

        Args:
            model: The model.
            stack: The draft's.
            top: Index of the first step with keys and values of its own.
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
            torch.cat([prompt[: text.prompt_length], own[:count]])
            for prompt, own, text, count in zip(known, asked, self._texts, counts, strict=True)
        ]
        longest = max(map(len, whole))
        x = torch.stack(
            [functional.pad(states, (0, 0, 0, longest - len(states))) for states in whole]
        )  # [b, n, hidden_size]
        x = stack.run(x, model.pass_context(longest, model.new_cache(longest)), start=top)
        rows = zip(x, self._texts, counts, strict=True)
        return torch.cat([row[text.prompt_length : text.prompt_length + count] for row, text, count in rows])


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack([functional.pad(row, (0, width - len(row))) for row in rows])


def _longer(past: Tensor, length: int) -> Tensor:
    """Keys or values of one text, ``[heads, n, dim]``, padded to ``length`` positions; the added ones are masked."""
    return functional.pad(past, (0, 0, 0, length - past.shape[1]))
