r"""Errors and intervals of the mean of K draws, and of the log of the mean of K weights.

The mean of draws y_k has standard error s/√K, and an interval from Student's t with

    1/ν = 1/(K − 1) + γ²/K                                                  γ the draws' skewness

degrees of freedom.  The second part pays for the skewness: by the Edgeworth expansion of the
t-statistic (Hall, 1992) a two-sided interval of half width q has to grow by the factor
1 + (q⁴ + 2q² − 3)/18 · γ²/K, at 95 % 1.08 γ²/K, and Student's quantile grows by (q² + 1)/4ν.

The log of a mean weight, L = log (1/K) Σ_k w_k, is taken for the mean of the jackknife's
pseudo-values (Tukey, 1958)

    Y_k = K L − (K − 1) L^(−k),         L^(−k) the same of the others,

so that again se = s_Y/√K.  Its square is on average no less than (K − 1)/K times the variance of
the L of K − 1 weights, whatever their law (Efron and Stein, 1981); the delta method's

    s_w / (w̄ √K)  =  (K/(K − 1) Σ_k (w_k/Σw − 1/K)²)^½

never exceeds 1, and is 10 times too small where one weight dominates.  Here

    1/ν = 1/(K − 1) + a γ_Y²/(K − 3),       a = 9/4, or 3 for the jackknife's own estimate Ȳ

where a and K − 3 are measured (``benchmarks/coverage.py``): the skewness of few pseudo-values is
less than their law's.  One dominant weight has a γ_Y² near K, and ν near 0.4.

Errors that the draws cannot tell are NaN, and ``remarks`` says why.  That decision must not depend
on the error itself, or the remaining intervals would be those that miss: weights count as too heavy
by their spread on the *lower* side, which measures how wide their law is without looking at the few
largest.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FEWEST",
    "WIDEST",
    "Summary",
    "log_mean_exp",
    "log_mean_of_weights",
    "mean_of_draws",
    "pseudo_values",
    "unskewed",
    "weights_std_error",
]

FEWEST = 8  # weights, to judge how heavy their tail is
WIDEST = 2.5  # nats, root mean square below the median, from which weights are too heavy

ONE_DRAW = "Standard errors are NaN: one draw does not tell its spread."
FEW_WEIGHTS = f"Standard errors are NaN: fewer than {FEWEST} weights do not tell theirs."
HEAVY_WEIGHTS = (
    f"Some standard errors are NaN: log weights that spread by more than {WIDEST} nats below "
    "their median are too heavy for their number to tell the error."
)


class Summary(NamedTuple):
    """Of each row of draws: value, standard error and its degrees of freedom, (n,); nats."""

    value: Tensor
    std_error: Tensor
    degrees_of_freedom: Tensor
    remarks: str


def log_mean_exp(log_w: Tensor) -> Tensor:
    """log of the mean of e^{log w} over the last axis."""
    return log_w.logsumexp(-1) - math.log(log_w.shape[-1])


def weights_std_error(log_w: Tensor) -> Tensor:
    """The delta method's standard error of log mean w over the last axis; NaN for K = 1.

    Too small for weights that spread: by a tenth where their logs' standard deviation is 1, at
    K = 16; it never exceeds 1.
    """
    count = log_w.shape[-1]
    if count == 1:
        return torch.full_like(log_w[..., 0], torch.nan)
    share = log_w.softmax(-1) - 1 / count
    return (share.square().sum(-1) * count / (count - 1)).sqrt()


def pseudo_values(log_w: Tensor) -> Tensor:
    """Y_k of log mean w, (…, K), K ≥ 2; their mean is the jackknife's estimate of log E w."""
    count = log_w.shape[-1]
    # log Σ of the others, from the sums on either side: no subtraction of nearly equal sums
    none = torch.full_like(log_w[..., :1], -torch.inf)
    before = torch.cat([none, log_w[..., :-1].logcumsumexp(-1)], -1)
    after = torch.cat([log_w[..., 1:].flip(-1).logcumsumexp(-1).flip(-1), none], -1)
    left_out = torch.logaddexp(before, after) - math.log(count - 1)
    return count * log_mean_exp(log_w).unsqueeze(-1) - (count - 1) * left_out


def mean_of_draws(draws: Tensor) -> Summary:
    """The mean over the last axis, whose error one draw cannot know: NaN."""
    count, value = draws.shape[-1], draws.mean(-1)
    if count == 1:
        unknown = torch.full_like(value, torch.nan)
        return Summary(value, unknown, torch.zeros_like(value), ONE_DRAW)
    std_error = draws.std(-1) / math.sqrt(count)
    return Summary(value, std_error, _freedom(draws, 1 / count), "")


def log_mean_of_weights(log_w: Tensor, debiased: bool = False, widest: float = WIDEST) -> Summary:
    """log mean w over the last axis, or Ȳ; errors of NaN for few or heavy weights (``widest``)."""
    count, value = log_w.shape[-1], log_mean_exp(log_w)
    draws = pseudo_values(log_w) if count > 1 else log_w
    value = draws.mean(-1) if debiased else value
    unknown = torch.full_like(value, torch.nan)
    if count < FEWEST:
        return Summary(value, unknown, torch.zeros_like(value), FEW_WEIGHTS)
    heavy = _spread_below(log_w) > widest
    std_error = torch.where(heavy, unknown, draws.std(-1) / math.sqrt(count))
    freedom = _freedom(draws, (3 if debiased else 2.25) / (count - 3))
    return Summary(value, std_error, freedom, HEAVY_WEIGHTS if bool(heavy.any()) else "")


def _freedom(draws: Tensor, weight: float) -> Tensor:
    """ν = 1/(1/(K − 1) + weight · γ²), (…,)."""
    centred = draws - draws.mean(-1, keepdim=True)
    spread = centred.square().mean(-1)
    even = spread == 0  # equal draws have no skewness
    skewness = centred.pow(3).mean(-1) / torch.where(even, 1.0, spread).pow(1.5)
    return 1 / (1 / (draws.shape[-1] - 1) + weight * skewness.square())


def _spread_below(log_w: Tensor) -> Tensor:
    """Root mean square distance from the median of the values below it, nats, (…,).

    Weights of 0 are left out of the mean, not of the median.
    """
    half = log_w.shape[-1] // 2
    ordered = log_w.sort(-1).values
    median = 0.5 * (ordered[..., half] + ordered[..., -half - 1]).unsqueeze(-1)
    distance = median - ordered[..., :half]
    finite = distance.isfinite()
    return (distance.where(finite, 0.0).square().sum(-1) / finite.sum(-1).clamp(min=1)).sqrt()


def unskewed(h: Tensor, skewness: Tensor) -> Tensor:
    """The T with T + g T²/3 + g² T³/27 + g/6 = h, for skewness g: 3/g (∛(1 + g (h − g/6)) − 1)."""
    flat = skewness.abs() < 1e-6
    g = torch.where(flat, 1.0, skewness)
    inner = 1 + g * (h - g / 6)
    root = inner.sign() * inner.abs() ** (1 / 3)
    return torch.where(flat, h, 3 / g * (root - 1))
