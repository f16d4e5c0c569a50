"""Bridges: an affine map in place of a run of skipped sublayers, fitted in closed form.

The linear shortcut of Din et al. (arXiv 2303.09435), between the boundaries that a skip set needs. A run of skipped
sublayers from boundary ``a`` to boundary ``b`` becomes ``x <- x + W x + c``, where ``W`` and ``c`` are the ridge
regression from the target model's hidden states at ``a`` to their change until ``b``.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from layerskip.sublayers import PassContext

# A bridge must have clearly fewer weights than what it stands in for: each weight is read once a step.
_WORTH = 1 / 3
# From this width on a d×d product costs too much; a product of rank d / 8 costs a quarter of it.
_LOW_RANK_FROM = 2048
_RANK_DIVISOR = 8
_BRIDGES_KEPT = 256
# Tried for each run, in units of the states' mean variance.
_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Attention sinks have hidden states of a size of their own, which would dominate a least-squares fit.
_OUTLIER = 8.0


class Bridge(nn.Module):
    """``x <- x + W x + c`` in place of sublayers ``start`` to ``stop - 1``.

    Args:
        start: Index of the first sublayer that it replaces.
        stop: Index after the last.
        factor: ``W``, applied one after the other: one ``[hidden_size, hidden_size]``, or two of low rank,
            ``[rank, hidden_size]`` and ``[hidden_size, rank]``.
        bias: ``c``, ``[hidden_size]``.
    """

    remembers: ClassVar = False

    def __init__(self, start: int, stop: int, factor: Sequence[Tensor], bias: Tensor) -> None:
        super().__init__()
        self.start, self.stop = start, stop
        self.factor = nn.ParameterList([nn.Parameter(each, requires_grad=False) for each in factor])
        self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_tensors(cls, start: int, stop: int, tensors: Mapping[str, Tensor]) -> Bridge:
        """The bridge with these weights, by the names in its ``state_dict``.

        Raises:
            InvalidInputError: One is missing.
        """
        factor = [tensors[name] for name in sorted(tensors) if name.startswith("factor.")]
        if not factor or "bias" not in tensors:
            raise InvalidInputError(f"bridge.{start}.{stop}: expected bias and factor.0, found {', '.join(tensors)}")
        return cls(start, stop, factor, tensors["bias"])

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def forward(self, x: Tensor, context: PassContext) -> Tensor:
        """As :class:`layerskip.sublayers.Step`."""
        x = x.to(self.bias.device)
        *first, last = self.factor
        change = x
        for factor in first:
            change = functional.linear(change, factor)
        return x + functional.linear(change, last, self.bias)


def blank_bridge(model: LayerSkipModel) -> Bridge:
    """A bridge of the form that the model's bridges have and that changes nothing, to measure what bridges cost."""
    size = int(model.config.hidden_size)
    zeros = torch.zeros(size, dtype=model.dtype, device=model.device)
    if size < _LOW_RANK_FROM:
        return Bridge(0, 1, [zeros.new_zeros(size, size)], zeros)
    rank = size // _RANK_DIVISOR
    return Bridge(0, 1, [zeros.new_zeros(rank, size), zeros.new_zeros(size, rank)], zeros)


@torch.inference_mode()
def record_states(model: LayerSkipModel, texts: Sequence[Sequence[int]], *, positions: int = 2048) -> Tensor:
    """The target model's hidden states at every boundary between sublayers.

    Args:
        model: The model.
        texts: Token ids of texts as the model writes them: prompts with its own continuations.
        positions: Most positions to keep, taken from all texts alike.

    Returns:
        ``[2 * num_layers + 1, n, hidden_size]`` in the model's dtype; attention-sink positions are left out.

    Raises:
        InvalidInputError: There is no text, or an empty one.
    """
    if not len(texts) or not all(len(text) for text in texts):
        raise InvalidInputError("texts: expected at least one, each the token ids of a text, and none of them empty")
    share = max(positions // max(len(texts), 1), 1)
    recorded = []
    for text in texts:
        tokens = torch.tensor(text, device=model.device)
        context = model.pass_context(len(tokens), model.new_cache(len(tokens)))
        x = model.embed(tokens)
        boundaries = [x[0]]
        for _, sublayer in model.target_stack.steps:
            x = sublayer(x, context)
            boundaries.append(x[0].to(model.device))
        states = torch.stack(boundaries)
        recorded.append(states[:, torch.linspace(0, len(tokens) - 1, min(share, len(tokens))).round().long()])
    return without_outliers(torch.cat(recorded, dim=1))


def without_outliers(states: Tensor) -> Tensor:
    """Leave out the positions, such as attention sinks, whose states are far larger than usual at some boundary.

    Args:
        states: ``[boundaries, n, hidden_size]``.
    """
    sizes = states.float().norm(dim=-1)  # [boundaries, n]
    usual = (sizes <= _OUTLIER * sizes.median(dim=1, keepdim=True).values).all(dim=0)
    return states[:, usual]


class BridgeFitter:
    """Fits the bridges of any skip set to hidden states that were recorded once.

    Kept for each boundary once it was needed: the eigenvectors of its Gram matrix. Another skip set then costs a few
    matrix products for each of its runs, and trying another ridge costs next to nothing.

    Args:
        model: The model.
        states: ``[2 * num_layers + 1, n, hidden_size]``, from :func:`record_states`.
        ridge: Strength of the regularization, in units of the states' mean variance; None chooses it for each run, by
            the error on a quarter of the positions that is kept out of the fit.
    """

    def __init__(self, model: LayerSkipModel, states: Tensor, *, ridge: float | None = None) -> None:
        self._weights = [sublayer.num_weights for sublayer in model.sublayers]
        self._states = states
        self._ridges = _RIDGES if ridge is None else (ridge,)
        self._held_out = torch.arange(states.shape[1], device=states.device) % 4 == 3
        self._spectra: dict[int, tuple[Tensor, Tensor]] = {}
        self._fitted: OrderedDict[tuple[int, int], Bridge] = OrderedDict()

    def fit(self, skip_set: SkipSet) -> list[Bridge]:
        """A bridge for each maximal run of skipped sublayers that is worth one, in order."""
        return [self._bridge(start, stop) for start, stop in self.worthy_runs(skip_set)]

    def worthy_runs(self, skip_set: SkipSet) -> list[tuple[int, int]]:
        """The maximal runs of skipped sublayers that cost clearly more than a bridge."""
        return [run for run in runs_of(skip_set) if self.worth_it(*run)]

    def _bridge(self, start: int, stop: int) -> Bridge:
        """Fitted once: skip sets that a search tries one after the other share most of their runs."""
        if (start, stop) not in self._fitted:
            self._fitted[start, stop] = self._fit_run(start, stop)
            if len(self._fitted) > _BRIDGES_KEPT:
                self._fitted.popitem(last=False)
        self._fitted.move_to_end((start, stop))
        return self._fitted[start, stop]

    def worth_it(self, start: int, stop: int) -> bool:
        """Whether a run of sublayers costs clearly more than a bridge in its place."""
        return _bridge_weights(self._states.shape[-1]) <= _WORTH * sum(self._weights[start:stop])

    @torch.no_grad()  # not in inference mode: tensors that were made there cannot be trained
    def _fit_run(self, start: int, stop: int) -> Bridge:
        before, after = self._states[start].float(), self._states[stop].float()
        change = after - before
        fitted = ~self._held_out
        x_mean, y_mean = before[fitted].mean(0), change[fitted].mean(0)
        x, y = before - x_mean, change - y_mean
        values, vectors = self._spectrum(start, x[fitted])
        projected = vectors.T @ (x[fitted].T @ y[fitted])  # [hidden_size, hidden_size]
        solutions = [vectors @ (projected / (values + ridge * values.mean())[:, None]) for ridge in self._ridges]
        # y ≈ x @ solution
        x_kept_out, y_kept_out = x[self._held_out], y[self._held_out]
        solution = min(solutions, key=lambda w: float((y_kept_out - x_kept_out @ w).square().sum()))
        factors: tuple[Tensor, ...] = (solution.T,)
        if len(solution) >= _LOW_RANK_FROM:
            factors = _low_rank(x, solution, len(solution) // _RANK_DIVISOR)
        mapped = x_mean
        for factor in factors:
            mapped = functional.linear(mapped, factor)
        weights = [each.contiguous().to(self._states) for each in (*factors, y_mean - mapped)]
        return Bridge(start, stop, weights[:-1], weights[-1])

    def _spectrum(self, boundary: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of a boundary's Gram matrix."""
        if boundary not in self._spectra:
            values, vectors = torch.linalg.eigh(x.T @ x)
            self._spectra[boundary] = values.clamp(min=0), vectors
        return self._spectra[boundary]


def fit_bridges(
    model: LayerSkipModel, texts: Sequence[Sequence[int]], skip_set: SkipSet, *, ridge: float | None = None
) -> list[Bridge]:
    """Fit the bridges of one skip set; :class:`BridgeFitter` fits many to the same recorded states.

    Args:
        model: The model.
        texts: Token ids of texts as the model writes them; a few thousand tokens in all.
        skip_set: The sublayers that the draft skips.
        ridge: Strength of the regularization, in units of the states' mean variance; None chooses it for each run.

    Returns:
        Bridges in order, for :class:`layerskip.drafting.weights.DraftWeights`.

    Raises:
        InvalidInputError: There is no text, or an empty one.
    """
    return BridgeFitter(model, record_states(model, texts), ridge=ridge).fit(skip_set)


def fit_bridge(model: LayerSkipModel, before: Tensor, after: Tensor, start: int, stop: int) -> Bridge:
    """Fit the bridge of one run to hidden states at its two ends.

    Args:
        model: The model.
        before: ``[n, hidden_size]``, the target model's hidden states before sublayer ``start``.
        after: Likewise, before sublayer ``stop``.
        start: Index of the run's first sublayer.
        stop: Index after its last.
    """
    states = without_outliers(torch.stack([before, after]))
    fitted = BridgeFitter(model, states)._fit_run(0, 1)
    return Bridge(start, stop, list(fitted.factor), fitted.bias)


def runs_of(skip_set: SkipSet) -> list[tuple[int, int]]:
    """The maximal runs of skipped sublayers, each as (index of the first, index after the last)."""
    runs = []
    for skipped, indices in itertools.groupby(range(len(skip_set.mask)), key=skip_set.mask.__getitem__):
        run = list(indices)
        if skipped:
            runs.append((run[0], run[-1] + 1))
    return runs


def _bridge_weights(hidden_size: int) -> int:
    if hidden_size < _LOW_RANK_FROM:
        return hidden_size * hidden_size
    return 2 * hidden_size * (hidden_size // _RANK_DIVISOR)


def _low_rank(x: Tensor, solution: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best map of a rank for these states: the solution, projected on its predictions' main directions."""
    predicted = x @ solution
    main = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -rank:]  # [hidden_size, rank]
    return (solution @ main).T, main
