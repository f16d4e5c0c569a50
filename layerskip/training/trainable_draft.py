"""What is trained: a stand-in for a run of skipped sublayers, or draft heads; with the tensors to be learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.drafting.bridges import Bridge
from layerskip.drafting.draft_layer import DraftLayerWeights, draft_layer_step
from layerskip.drafting.heads import DraftHeads, heads_of
from layerskip.drafting.weights import DraftWeights
from layerskip.kv_cache import KVCache
from layerskip.model import LayerSkipModel
from layerskip.sublayers import Step
from layerskip.target_texts import TargetText

# How much less each head's loss counts than that of the one before (Medusa, arXiv 2401.10774, section 2.2.1).
_HEAD_WEIGHT = 0.8
# What the parameters of a layer before heads are called, in front of their names in the layer.
_PREFIX = "prefix."


@dataclass(frozen=True)
class DraftOutput:
    """What a draft says at some positions of some texts, for one place of its drafts.

    Args:
        states: ``[p, hidden_size]``, the draft's hidden states, to be scored.
        after: ``[p, hidden_size]``, the target model's last ones, where it chose the tokens that are guessed.
        choices: ``[p]``, those tokens.
        weight: How much the mean loss counts.
    """

    states: Tensor
    after: Tensor
    choices: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class TrainableDraft:
    """Something to be trained, in float32 whatever the model's dtype is.

    Args:
        start: Index of the first sublayer that it stands for; behind the last one for draft heads.
        stop: Index behind the last sublayer that it stands for.
        guesses: What it says about texts, taken whole: for each place of its drafts, the first one first. Each text's
            positions are those at which a draft would be asked.
        parameters: What is learned, by name; guesses are made with these very tensors.
        assets: The draft's tensors, made of other values of the parameters.
    """

    start: int
    stop: int
    guesses: Callable[[Sequence[TargetText]], list[DraftOutput]]
    parameters: Mapping[str, nn.Parameter]
    assets: Callable[[Mapping[str, Tensor]], DraftWeights]


def trainable_layer(model: LayerSkipModel, weights: DraftLayerWeights) -> TrainableDraft:
    """A decoder layer, from the weights to start with."""
    like = torch.empty(0, device=model.device)
    layer = weights.to(like).module(model, slot=model.num_layers)

    def assets(values: Mapping[str, Tensor]) -> DraftWeights:
        return DraftWeights(
            layers={weights.start: DraftLayerWeights(weights.start, weights.stop, weights.like, values)}
        )

    step = draft_layer_step(model, layer, weights.like)
    guesses = _guesses_above(model, step)
    return TrainableDraft(weights.start, weights.stop, guesses, dict(layer.named_parameters()), assets)


def trainable_bridge(model: LayerSkipModel, bridge: Bridge) -> TrainableDraft:
    """An affine map, from the closed-form solution."""
    like = torch.empty(0, device=model.device)
    bridge = bridge.to(like)
    factors = tuple(nn.Parameter(factor.clone()) for factor in bridge.factors)
    bias = nn.Parameter(bridge.bias.clone())

    def assets(values: Mapping[str, Tensor]) -> DraftWeights:
        learned = tuple(values[f"factor.{number}"] for number in range(len(factors)))
        return DraftWeights({bridge.start: Bridge(bridge.start, bridge.stop, learned, values["bias"])})

    named = {f"factor.{number}": factor for number, factor in enumerate(factors)} | {"bias": bias}
    guesses = _guesses_above(model, Bridge(bridge.start, bridge.stop, factors, bias))
    return TrainableDraft(bridge.start, bridge.stop, guesses, named, assets)


def trainable_heads(
    model: LayerSkipModel, heads: DraftHeads, prefix: DraftLayerWeights | None = None
) -> TrainableDraft:
    """Draft heads, from the weights to start with; later ones count less.

    Args:
        model: The target model.
        heads: The heads.
        prefix: A layer behind all sublayers, which is learned together with them: they read what it makes of a text's
            last hidden states (Hydra++). None lets them read those.
    """
    parameters = {name: nn.Parameter(value.to(model.device).float().clone()) for name, value in heads.tensors().items()}
    learned = heads_of(parameters)
    assert learned is not None
    states_of: Callable[[Sequence[TargetText]], list[Tensor]] = _last_states
    if prefix is not None:
        layer = prefix.to(torch.empty(0, device=model.device)).module(model, slot=0)
        parameters |= {f"{_PREFIX}{name}": weight for name, weight in layer.named_parameters()}
        states_of = _states_through(model, draft_layer_step(model, layer, prefix.like))

    def guesses(texts: Sequence[TargetText]) -> list[DraftOutput]:
        states = states_of(texts)
        return [_guesses_at(model, learned, place, texts, states) for place in range(learned.count)]

    def assets(values: Mapping[str, Tensor]) -> DraftWeights:
        return DraftWeights(layers={} if prefix is None else _prefix_from(values, prefix), heads=heads_of(values))

    top = len(model.sublayers)
    return TrainableDraft(top, top, guesses, parameters, assets)


def _prefix_from(values: Mapping[str, Tensor], like: DraftLayerWeights) -> dict[int, DraftLayerWeights]:
    weights = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
    return {like.start: DraftLayerWeights(like.start, like.stop, like.like, weights)}


def _last_states(texts: Sequence[TargetText]) -> list[Tensor]:
    """Of each text, ``[n - 1, hidden_size]``: the target model's."""
    return [text.states[1] for text in texts]


def _states_through(model: LayerSkipModel, layer: Step) -> Callable[[Sequence[TargetText]], list[Tensor]]:
    """As :func:`_last_states`, but what a layer makes of them."""

    def states(texts: Sequence[TargetText]) -> list[Tensor]:
        through = _through(model, layer, [text.states[1] for text in texts])  # [b, longest, hidden_size]
        return [row[: len(text.tokens) - 1] for row, text in zip(through, texts, strict=True)]

    return states


def _guesses_at(
    model: LayerSkipModel, heads: DraftHeads, place: int, texts: Sequence[TargetText], states: Sequence[Tensor]
) -> DraftOutput:
    """What a head says where the text goes on for long enough, and is as it was up to the head's place.

    Args:
        model: The target model.
        heads: The heads.
        place: Which of them.
        texts: The texts.
        states: Of each, ``[n - 1, hidden_size]``, what the heads read.
    """
    ahead = place + 1
    sources, known, targets, choices = [], [], [], []
    for text, read in zip(texts, states, strict=True):
        after = text.states[1, text.asked]
        if len(after) < ahead:
            continue
        sources.append(read[text.prompt_length - 1 : -ahead])
        known.append(text.tokens[text.asked].unfold(0, ahead, 1))  # [p, ahead]
        targets.append(after[place:])
        choices.append(text.choices[place:])
    if not sources:
        nothing = torch.empty(0, int(model.config.hidden_size), device=model.device)
        return DraftOutput(nothing, nothing, torch.empty(0, dtype=torch.long))
    tokens = torch.cat(known).to(model.device).long()
    with torch.no_grad():
        embedded = model.embed(tokens.flatten())[0].float().unflatten(0, tokens.shape)
    said = heads.at(place, torch.cat(sources).to(model.device).float(), embedded)
    return DraftOutput(said, torch.cat(targets).to(model.device), torch.cat(choices), _HEAD_WEIGHT**ahead)


def _guesses_above(model: LayerSkipModel, step: Step) -> Callable[[Sequence[TargetText]], list[DraftOutput]]:
    """Those of a draft that has one step above what the target model computes too."""

    def guesses(texts: Sequence[TargetText]) -> list[DraftOutput]:
        through = _through(model, step, [text.states[0] for text in texts])  # [b, longest, hidden_size]
        states = torch.cat([row[text.asked] for row, text in zip(through, texts, strict=True)])
        after = torch.cat([text.states[1, text.asked] for text in texts])
        choices = torch.cat([text.choices for text in texts])
        return [DraftOutput(states, after.to(model.device), choices)]

    return guesses


def _through(model: LayerSkipModel, step: Step, texts: Sequence[Tensor]) -> Tensor:
    """What a step makes of texts' hidden states, ``[n, hidden_size]`` each: ``[b, longest, hidden_size]``.

    A text is taken as a whole, with a causal mask, so that a layer's attention sees its own keys of all positions
    before, as in decoding.
    """
    longest = max(map(len, texts))
    padded = torch.stack([functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
    return step(padded.to(model.device, torch.float32), model.pass_context(longest, _Forgetful()))


class _Forgetful(KVCache):
    """For passes over whole texts: keys and values are those of the pass alone, for any number of texts."""

    def __init__(self) -> None:
        super().__init__(num_layers=0, capacity=0)

    def reserve(self, positions: int) -> None:
        pass

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return keys, values
