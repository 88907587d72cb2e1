r"""Regressions of terms on controls and curves, kept only where they help on held-back samples.

At each node j there are terms y (M samples, R draws each) in units of u_t, controls c of mean zero
and curves b of x_0.  Within a sample y is regressed on c by ridge, between samples what is left on
b.  Candidates are compared on samples that they were not fitted to, two halves in turn: no
controls, the few of the affine denoiser, or all of them, each fitted at the node alone or with its
neighbours counting half; and a constant, or all curves.  More is taken only where it leaves 5 %
less.  Between nodes, coefficients are tried on draws of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Drawn", "Regression", "regress", "scaled"]

_RIDGE = 1e-3  # relative to each regressor's mean square
_MARGIN = 0.95
_NEIGHBOUR = 0.5


class Drawn(NamedTuple):
    """The draws at J steps, float64."""

    terms: Tensor
    """Shape (J, M, R)."""
    controls: Tensor
    """Shape (J, M, R, F)."""
    curves: Tensor
    """Shape (J, M, K)."""


class Regression(NamedTuple):
    """What to subtract at J steps, and what that leaves on held-back samples."""

    controls: Tensor
    """Coefficients γ, shape (J, F)."""
    curves: Tensor
    """Coefficients β, shape (J, K)."""
    noise: Tensor
    """The spread over the noise that is left, shape (J,)."""
    kurtosis: Tensor
    """The excess kurtosis of that, shape (J,)."""
    misfit: Tensor
    """The spread over samples that is left, shape (J,)."""


def _noise_and_kurtosis(left: Tensor) -> tuple[Tensor, Tensor]:
    """Spread and excess kurtosis of draws from what they leave of their samples' means, (J, M, R).

    With R draws the deviations have (1 − 1/R) of the variance, and for excess kurtosis κ

        κ ((1 − 1/R)⁴ + (R − 1)/R⁴)/(1 − 1/R)².
    """
    repeats = left.shape[2]
    share = 1 - 1 / repeats
    second = left.square().flatten(1).mean(1)
    fourth = left.pow(4).flatten(1).mean(1)
    excess = fourth / second.square().clamp(min=1e-300) - 3
    factor = (share**4 + (repeats - 1) / repeats**4) / share**2
    return (second / share).sqrt(), torch.where(second > 0, excess / factor, 0.0)


def _ridge(gram: Tensor, moment: Tensor) -> Tensor:
    """Coefficients from (…, F, F) and (…, F); a regressor that never varied gets none."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1, keepdim=True)
    # a regressor that hardly varied gets no large coefficient
    penalty = _RIDGE * diagonal + _RIDGE * 1e-2 * largest + 1e-300
    return torch.linalg.solve(gram + torch.diag_embed(penalty), moment)


def _with_neighbours(values: Tensor, alone: Tensor) -> Tensor:
    """Values of nodes, (J, …), and half of those of the nodes on either side in the same run."""
    total = values.clone()
    if len(values) > 1:
        joined = ~(alone[1:] | alone[:-1])
        share = _NEIGHBOUR * joined.double().reshape(-1, *(1,) * (values.dim() - 1))
        total[1:] += share * values[:-1]
        total[:-1] += share * values[1:]
    return total


def _fit(columns: Tensor, target: Tensor, pooled: bool, alone: Tensor) -> Tensor:
    """Coefficients at each node, (J, …, F) and (J, …) to (J, F)."""
    rows, y = columns.flatten(1, -2), target.flatten(1)
    gram, moment = rows.mT @ rows, (rows.mT @ y[..., None])[..., 0]
    if pooled:
        gram, moment = (_with_neighbours(v, alone) for v in (gram, moment))
    return _ridge(gram, moment)


def _apply(columns: Tensor, coefficients: Tensor) -> Tensor:
    return torch.einsum("j...f,jf->j...", columns, coefficients)


def _centred(values: Tensor, dim: int) -> Tensor:
    return values - values.mean(dim, keepdim=True)


def _halves(count: int) -> list[tuple[Tensor, Tensor]]:
    """Fitted and held-back samples, twice."""
    even = torch.arange(count) % 2 == 0
    return [(even, ~even), (~even, even)]


def _choose(
    columns: Tensor, target: Tensor, candidates: list[tuple[Tensor, bool]], alone: Tensor
) -> tuple[Tensor, Tensor]:
    """Coefficients, (J, F), and their residuals on held-back samples, of the target's shape.

    Args:
        columns: (J, M, …, F), centred.
        target: (J, M, …), centred.
        candidates: which columns, (F,) bool, and whether neighbours count; simplest first.
    """
    chosen, best = target.new_zeros(len(target), columns.shape[-1]), target
    for which, pooled in candidates:
        chosen_columns, left = columns[..., which], torch.zeros_like(target)
        for fitted, rest in _halves(target.shape[1]):
            coefficients = _fit(chosen_columns[:, fitted], target[:, fitted], pooled, alone)
            left[:, rest] = target[:, rest] - _apply(chosen_columns[:, rest], coefficients)
        squares = [v.square().flatten(1).sum(1) for v in (left, best)]
        better = squares[0] < _MARGIN * squares[1]
        whole = torch.zeros_like(chosen)
        whole[:, which] = _fit(chosen_columns, target, pooled, alone)
        chosen = torch.where(better[:, None], whole, chosen)
        best = torch.where(better.reshape(-1, *(1,) * (target.dim() - 1)), left, best)
    return chosen, best


def scaled(drawn: Drawn, controls: Tensor, curves: Tensor) -> Regression:
    """Coefficients of other nodes, (J, F) and (J, K), shrunk to what they explain here.

    Those of the controls are multiplied by their slope on the draws, between 0 and 1.
    """
    target, fitted = _centred(drawn.terms, 2), _apply(_centred(drawn.controls, 2), controls)
    square = fitted.square().flatten(1).sum(1).clamp(min=1e-300)
    share = ((fitted * target).flatten(1).sum(1) / square).clamp(0, 1)
    noise, kurtosis = _noise_and_kurtosis(target - share[:, None, None] * fitted)
    level = (drawn.terms - share[:, None, None] * _apply(drawn.controls, controls)).mean(2)
    between = (level - _apply(drawn.curves, curves)).square().mean(1)
    misfit = (between - noise.square() / target.shape[2]).clamp(min=0).sqrt()
    return Regression(controls * share[:, None], curves, noise, kurtosis, misfit)


def regress(drawn: Drawn, affine: int, alone: Tensor) -> Regression:
    """What to subtract at each node.

    Args:
        affine: how many controls, the last ones, are those of the affine denoiser.
        alone: nodes that are fitted without their neighbours, (J,) bool.
    """
    terms, controls, curves = drawn
    repeats, size = terms.shape[2], controls.shape[-1]
    every = torch.ones(size, dtype=torch.bool)
    few = torch.arange(size) >= size - affine
    candidates = [(which, pooled) for which in (few, every) for pooled in (False, True)]
    # Within a sample: L_t varies more between samples than with the noise.
    gamma, left = _choose(_centred(controls, 2), _centred(terms, 2), candidates, alone)
    noise, kurtosis = _noise_and_kurtosis(left)
    rest = (terms - _apply(controls, gamma)).mean(2)
    middle, level = curves.mean(1, keepdim=True), rest.mean(1)
    all_curves = [(torch.ones(curves.shape[-1], dtype=torch.bool), False)]
    slopes, missed = _choose(curves - middle, rest - level[:, None], all_curves, alone)
    constant = level - (middle[:, 0] * slopes).sum(1)
    misfit = (missed.square().mean(1) - noise.square() / repeats).clamp(min=0).sqrt()
    # all but the last curve add up to the same for every sample: a constant is one on all of them
    beta = slopes.clone()
    beta[:, :-1] += (constant / middle[:, 0, :-1].sum(1))[:, None]
    return Regression(gamma, beta, noise, kurtosis, misfit)
