"""Bridges: an affine map in place of a run of skipped sublayers, fitted in closed form.

The linear shortcut of Din et al. (arXiv 2303.09435), between the boundaries that a skip set needs. A run of skipped
sublayers from boundary ``a`` to boundary ``b`` becomes ``x <- x + W x + c``, where ``W`` and ``c`` are the ridge
regression from the target model's hidden states at ``a`` to their change until ``b``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerskip.errors import InvalidInputError
from layerskip.model import LayerSkipModel
from layerskip.skip_set import SkipSet
from layerskip.sublayers import PassContext
from layerskip.target_texts import run_keeping_states

# A bridge must have clearly fewer weights than what it replaces: each weight is read once a step.
_WORTH = 1 / 3
# From this width on a d×d product costs too much; a product of rank d / 8 costs a quarter of it.
_LOW_RANK_FROM = 2048
_RANK_DIVISOR = 8
# Memory for bridges, and for the spectra that they are fitted with, each; those used last are kept.
_BYTES_KEPT = 256 * 2**20
# Tried for each run, in units of the states' mean variance.
_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Attention sinks have hidden states of a size of their own, which would dominate a least-squares fit.
_OUTLIER = 8.0


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


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
        ``[2 * num_layers + 1, n, hidden_size]`` in the model's dtype and in main memory; attention-sink positions are
        left out.

    Raises:
        InvalidInputError: There is no text, or an empty one.
    """
    if not len(texts) or not all(len(text) for text in texts):
        raise InvalidInputError("texts: expected at least one, each the token ids of a text, and none of them empty")
    share = max(positions // max(len(texts), 1), 1)
    recorded = []
    for text in texts:
        tokens = torch.tensor(text, device=model.device)
        spaced = torch.linspace(0, len(tokens) - 1, min(share, len(tokens))).round().long()
        recorded.append(run_keeping_states(model, tokens, model.new_cache(len(tokens)), spaced)[1].cpu())
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

    Kept for each boundary once it was needed: the eigenvectors of its Gram matrix, over features or over positions,
    whichever are fewer. Another skip set then costs a few matrix products for each of its runs, and trying another
    ridge costs next to nothing. Only the states at two boundaries are on the model's device at a time.

    Args:
        model: The model.
        states: ``[2 * num_layers + 1, n, hidden_size]``, from :func:`record_states`, on any device.
        ridge: Strength of the regularization, in units of the states' mean variance; None chooses it for each run, by
            the error on a quarter of the positions that is kept out of the fit.
    """

    def __init__(self, model: LayerSkipModel, states: Tensor, *, ridge: float | None = None) -> None:
        self._weights = [sublayer.num_weights for sublayer in model.sublayers]
        self._states, self._device = states, model.device
        self._ridges = _RIDGES if ridge is None else (ridge,)
        self._spectra = _LastUsed[int, _Spectrum](lambda spectrum: spectrum.nbytes)
        self._fitted = _LastUsed[tuple[int, int], Bridge](lambda bridge: sum(w.nbytes for w in bridge.parameters()))

    def fit(self, skip_set: SkipSet) -> list[Bridge]:
        """A bridge for each maximal run of skipped sublayers that is worth one, in order."""
        return [self._bridge(start, stop) for start, stop in self.runs_to_bridge(skip_set)]

    def runs_to_bridge(self, skip_set: SkipSet) -> list[tuple[int, int]]:
        """The maximal runs of skipped sublayers that cost clearly more than a bridge."""
        return [run for run in skip_set.runs if self.is_cheaper(*run)]

    def _bridge(self, start: int, stop: int) -> Bridge:
        """Fitted once: skip sets that a search tries one after the other share most of their runs."""
        return self._fitted.get((start, stop), lambda: self._fit_run(start, stop))

    def is_cheaper(self, start: int, stop: int) -> bool:
        """Whether a bridge costs clearly less than the run of sublayers that it would replace."""
        return _bridge_weights(self._states.shape[-1]) <= _WORTH * sum(self._weights[start:stop])

    def _fit_run(self, start: int, stop: int) -> Bridge:
        before, after = (self._states[boundary].to(self._device) for boundary in (start, stop))
        spectrum = self._spectra.get(start, lambda: _Spectrum.of(before))
        return _fitted(start, stop, before, after, spectrum, self._ridges)


class _LastUsed(Generic[Key, Value]):
    """Keeps what was used last, up to a number of bytes.

    Args:
        nbytes: Bytes of a value.
    """

    def __init__(self, nbytes: Callable[[Value], int]) -> None:
        self._nbytes, self._total = nbytes, 0
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made now where it is not kept."""
        if key not in self._values:
            self._values[key] = make()
            self._total += self._nbytes(self._values[key])
        self._values.move_to_end(key)
        while self._total > _BYTES_KEPT and len(self._values) > 1:
            self._total -= self._nbytes(self._values.popitem(last=False)[1])
        return self._values[key]


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


def fit_bridge(before: Tensor, after: Tensor, start: int, stop: int) -> Bridge:
    """Fit the bridge of one run to hidden states at its two ends.

    Args:
        before: ``[n, hidden_size]``, the target model's hidden states before sublayer ``start``.
        after: Likewise, before sublayer ``stop``.
        start: Index of the run's first sublayer.
        stop: Index after its last.
    """
    before, after = without_outliers(torch.stack([before, after]))
    return _fitted(start, stop, before, after, _Spectrum.of(before), _RIDGES)


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues and eigenvectors of the Gram matrix of the states at a boundary.

    Args:
        values: ``[m]``; of ``m`` features or, where they are fewer, positions. The other matrix has the same ones, and
            zeros.
        vectors: ``[m, m]``, in columns.
        mean: The mean over all features' eigenvalues.
    """

    values: Tensor
    vectors: Tensor
    mean: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, before: Tensor) -> _Spectrum:
        """The spectrum of states ``[n, hidden_size]``, of which a quarter is kept out."""
        x = before.float()[~_held_out(before)]
        x = x - x.mean(0)
        values, vectors = torch.linalg.eigh(x @ x.T if len(x) < x.shape[1] else x.T @ x)
        return cls(values.clamp(min=0), vectors, x.square().sum() / x.shape[1])

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.vectors.nbytes

    def basis(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For the states ``x``, ``[n, hidden_size]``, that it is the spectrum of: ``B`` and ``A`` of the solution.

        The ridge regression to ``y`` is ``B diag(1 / (values + ridge)) A y``, where ``B`` is ``[hidden_size, m]`` and
        ``A`` is ``[m, n]``.
        """
        if len(self.values) == x.shape[1]:  # by features: V and V' x'
            return self.vectors, self.vectors.T @ x.T
        return x.T @ self.vectors, self.vectors.T  # by positions: x' U and U'


@torch.no_grad()  # not in inference mode: tensors that were made there cannot be trained
def _fitted(
    start: int, stop: int, before: Tensor, after: Tensor, spectrum: _Spectrum, ridges: Sequence[float]
) -> Bridge:
    """The bridge of one run, by ridge regression from the states before it, ``[n, hidden_size]``, to their change.

    Of several ridges it takes the one with the smallest error on the positions that are kept out of the fit.
    """
    held_out = _held_out(before)
    x, y = before.float(), after.float() - before.float()
    x_mean, y_mean = x[~held_out].mean(0), y[~held_out].mean(0)
    x, y = x - x_mean, y - y_mean
    basis, projection = spectrum.basis(x[~held_out])
    projected = projection @ y[~held_out]  # [m, hidden_size]
    seen = x[held_out] @ basis  # [held out, m]

    def shrunk(ridge: float) -> Tensor:
        return projected / (spectrum.values + ridge * spectrum.mean)[:, None]

    # y ≈ x @ basis @ shrunk
    best = min(ridges, key=lambda ridge: float((y[held_out] - seen @ shrunk(ridge)).square().sum()))
    solution = basis @ shrunk(best)  # [hidden_size, hidden_size]
    factors: tuple[Tensor, ...] = (solution.T,)
    if len(solution) >= _LOW_RANK_FROM:
        factors = _low_rank(x, solution, len(solution) // _RANK_DIVISOR)
    mapped = x_mean
    for each in factors:
        mapped = functional.linear(mapped, each)
    *factor, bias = (each.contiguous().to(before) for each in (*factors, y_mean - mapped))
    return Bridge(start, stop, factor, bias)


def _held_out(states: Tensor) -> Tensor:
    """``[n]``, true at the quarter of the positions that is kept out of the fit."""
    return torch.arange(len(states), device=states.device) % 4 == 3


def _bridge_weights(hidden_size: int) -> int:
    if hidden_size < _LOW_RANK_FROM:
        return hidden_size * hidden_size
    return 2 * hidden_size * (hidden_size // _RANK_DIVISOR)


def _low_rank(x: Tensor, solution: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best map of a rank for these states: the solution, projected on its predictions' main directions."""
    predicted = x @ solution
    if len(x) < x.shape[1]:  # the same directions, from the smaller matrix
        main = predicted.T @ torch.linalg.eigh(predicted @ predicted.T).eigenvectors[:, -rank:]
        main = torch.linalg.qr(main).Q
    else:
        main = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -rank:]  # [hidden_size, rank]
    return (solution @ main).T, main
