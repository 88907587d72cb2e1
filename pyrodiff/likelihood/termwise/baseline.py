r"""A baseline that a sample's own draws give, without a bias.

Σ_t L_t is estimated stratum by stratum from draws f_i y_i, f_i = μ(s)/μ_t (``layout``).  With a
curve b over t whose sums are known, each draw is an estimate of its stratum's sum as it is,

    z_i = f_i y_i − (f_i b(t_i) − Σ_{t∈s} b(t)),

of less variance where b is near the terms.  b is a combination of w_t, the terms of a denoiser that
knows nothing, of w_t/(1 + SNR_t), those of the best one for standard normal data, and of the curve
that a pilot expects.  Draws of a stratum alternate between two halves, and the curve for either is
fitted to the other: z has the expectation of f y, whatever was fitted (cross-fitting, as in
Chernozhukov et al., 2018).  The first curve is hardly penalised, so that a sum without noise comes
out exact, and a pilot's curve that does not fit a sample gets a small coefficient.  Where a pilot's
curves missed its held-back samples by less than their noise, its curve is subtracted unchanged.

Each half's coefficients depend on the draws of the other, which the variance within a stratum does
not show.  A margin of p/(n/2), for p coefficients from n/2 draws each, allows for it.  Without it
the variance is right to 3 %; with it, it is up to a fifth too large at 32 calls, and intervals from
so few have the coverage that they claim.
"""

import torch
from torch import Tensor

from pyrodiff.likelihood.termwise.strata import Layout

__all__ = ["baseline_curves", "shared_error", "subtract_baseline"]

_FEWEST_DRAWS = 32  # to fit coefficients to: from fewer they cost more than they save
_PENALTIES = (1e-13, 1e-3, 1e-6)  # of the three curves, relative to their mean squares


def baseline_curves(weight: Tensor, log_snr: Tensor) -> Tensor:
    """w_t and w_t/(1 + SNR_t), shape (2, T)."""
    return torch.stack([weight, weight * torch.sigmoid(-log_snr)])


def _ridge(columns: Tensor, target: Tensor) -> Tensor:
    """Coefficients of columns, (n, p, c) and (n, c) to (n, p), each row by itself."""
    scale = columns.square().sum(-1).clamp(min=1e-300).rsqrt()
    scaled = columns * scale[..., None]
    gram = scaled @ scaled.mT + torch.tensor(_PENALTIES[: columns.shape[1]]).double().diag()
    moment = (scaled * target[:, None]).sum(-1)
    solution: Tensor = torch.linalg.solve(gram, moment)
    return solution * scale


def subtract_baseline(
    values: Tensor,
    t: Tensor,
    factor: Tensor,
    layout: Layout,
    curves: Tensor,
    as_it_is: bool = False,
) -> Tensor:
    """z of each draw, (n, c).

    Args:
        values: f y, shape (n, c).
        t, factor: of the draws, shape (n, c).
        layout: with c draws.
        curves: b's parts, shape (n, p, T) or (p, T); a third is a pilot's.
        as_it_is: take the third one for b.
    """
    stratum = layout.stratum
    wide = layout.width[stratum] > 1  # the sum over a single step is a draw as it is
    if not bool(wide.any()):
        return values
    curves = curves.expand(len(values), *curves.shape[-2:])
    columns = curves.gather(2, (t - 1)[:, None].expand(-1, curves.shape[1], -1)) * factor[:, None]
    centred = columns - layout.sums(curves)[..., stratum]
    if as_it_is or layout.total < _FEWEST_DRAWS:
        return values - centred[:, 2] if curves.shape[1] > 2 else values
    position = torch.arange(layout.total) - (layout.draws.cumsum(0) - layout.draws)[stratum]
    half = position % 2
    share = wide / layout.draws[stratum]  # the weight of a draw in the sum
    result = values.clone()
    for one in (0, 1):
        fit, use = (half != one) & wide, (half == one) & wide
        weighted = columns[..., fit] * share[fit]
        coefficients = _ridge(weighted, values[:, fit] * share[fit])
        result[:, use] -= (centred[..., use] * coefficients[..., None]).sum(1)
    return result


def shared_error(layout: Layout, curves: Tensor, as_it_is: bool = False) -> Tensor:
    """What the variance of each stratum is multiplied by for fitted coefficients, (S,)."""
    fitted = layout.total >= _FEWEST_DRAWS and not as_it_is
    share = curves.shape[-2] / (layout.total / 2) if fitted else 0.0
    return 1 + share * (layout.width > 1).double()
