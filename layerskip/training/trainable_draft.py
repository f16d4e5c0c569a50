"""A draft in training: its weights, and its outputs over whole texts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from layerskip.drafting.heads import DraftHeads
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sublayers import Step
from layerskip.target_texts import TargetText

# How much less each head's loss counts than that of the one before (Medusa, arXiv 2401.10774, section 2.2.1).
_HEAD_WEIGHT = 0.8


@dataclass(frozen=True)
class DraftOutput:
    """A draft's output at some positions of some texts, for one place of its drafts.

    Args:
        states: ``[p, hidden_size]``, the draft's hidden states, to be scored.
        after: ``[p, hidden_size]``, the target model's last ones, where it chose the tokens that are predicted.
        choices: ``[p]``, those tokens.
        weight: How much the mean loss counts.
    """

    states: Tensor
    after: Tensor
    choices: Tensor
    weight: float = 1.0


class TrainableDraft:
    """A draft in training, in float32 whatever the model's dtype is.

    Args:
        model: The target model.
        weights: What to train, which is copied: one draft layer or bridge that reaches the top of the stack, or draft
            heads, with or without the layer before them (Hydra++).

    Attributes:
        weights: The copy, which asks for gradients.

    Raises:
        InvalidInputError: The draft layer ends below the top of the stack.
    """

    def __init__(self, model: LayerSkipModel, weights: DraftWeights) -> None:
        self._model = model
        self.weights = copy.deepcopy(weights).to(model.device, torch.float32).requires_grad_()
        for step in (*weights.bridges, *weights.layers):
            if step.stop != len(model.sublayers):
                raise InvalidInputError(
                    f"draft layer: ends before sublayer {step.stop}; only one that reaches the top can be trained"
                )

    def outputs(self, texts: Sequence[TargetText]) -> list[DraftOutput]:
        """The draft's output over whole texts, at the positions at which a draft is asked, for each of its places."""
        heads = self.weights.heads
        if heads is None:
            [step] = self.weights.steps.values()
            return [self._above_exit(step, texts)]
        states = self._head_inputs(texts)
        return [self._at_place(heads, place, texts, states) for place in range(heads.count)]

    def _above_exit(self, step: Step, texts: Sequence[TargetText]) -> DraftOutput:
        """The output of a draft that has one step above sublayers of the target model."""
        through = self._through(step, [text.states[0] for text in texts])  # [b, longest, hidden_size]
        states = torch.cat([row[text.draft_positions] for row, text in zip(through, texts, strict=True)])
        after = torch.cat([text.states[1, text.draft_positions] for text in texts])
        choices = torch.cat([text.choices for text in texts])
        return DraftOutput(states, after.to(self._model.device), choices)

    def _head_inputs(self, texts: Sequence[TargetText]) -> list[Tensor]:
        """The states of each text that heads read, ``[n - 1, hidden_size]``."""
        last = [text.states[1] for text in texts]
        layer = self.weights.prefix_layer
        if layer is None:
            return last
        through = self._through(layer, last)  # [b, longest, hidden_size]
        return [row[: len(text.tokens) - 1] for row, text in zip(through, texts, strict=True)]

    def _at_place(
        self, heads: DraftHeads, place: int, texts: Sequence[TargetText], states: Sequence[Tensor]
    ) -> DraftOutput:
        """A head's output where the text is long enough, given the true tokens before its place.

        Args:
            heads: The heads.
            place: Which of them.
            texts: The texts.
            states: Of each, ``[n - 1, hidden_size]``, what the heads read.
        """
        ahead, device = place + 1, self._model.device
        sources, known, targets, choices = [], [], [], []
        for text, read in zip(texts, states, strict=True):
            after = text.states[1, text.draft_positions]
            if len(after) < ahead:
                continue
            sources.append(read[text.prompt_length - 1 : -ahead])
            known.append(text.tokens[text.draft_positions].unfold(0, ahead, 1))  # [p, ahead]
            targets.append(after[place:])
            choices.append(text.choices[place:])
        if not sources:
            nothing = torch.empty(0, heads.hidden_size, device=device)
            return DraftOutput(nothing, nothing, torch.empty(0, dtype=torch.long))
        tokens = torch.cat(known).to(device).long()
        with torch.no_grad():
            embedded = self._model.embed(tokens.flatten())[0].float().unflatten(0, tokens.shape)
        predicted = heads.at(place, torch.cat(sources).to(device).float(), embedded)
        return DraftOutput(predicted, torch.cat(targets).to(device), torch.cat(choices), _HEAD_WEIGHT**ahead)

    def _through(self, step: Step, texts: Sequence[Tensor]) -> Tensor:
        """Run texts' hidden states, ``[n, hidden_size]`` each, through a step: ``[b, longest, hidden_size]``.

        Texts are taken whole, with a causal mask, so that a layer's attention sees its own keys of all positions
        before, as in decoding.
        """
        longest = max(map(len, texts))
        padded = torch.stack([functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
        context = self._model.pass_context(longest, _NoCache())
        return step(padded.to(self._model.device, torch.float32), context)


class _NoCache(KVCache):
    """For passes over whole texts: attention sees the keys and values of the pass alone, for any number of texts."""

    def __init__(self) -> None:
        super().__init__(num_layers=0, capacity=0)

    def reserve(self, positions: int) -> None:
        pass

    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        return keys, values
