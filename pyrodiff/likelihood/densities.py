r"""Values whose exponentials may be averaged over models.

A mixture of models and the score of an ensemble take exp of log p.  Of a noisy value v = log p + e
that is not E[e^v] = p but, for normal noise of standard deviation σ,

    E e^v = p e^{σ²/2},

so that the log of a mean of them may exceed the truth by up to Σ_i σ_i²/2 over the samples: at 2
nats of noise by 2 nats a sample, whatever the reported error.  Values may be averaged as densities

    exact        without noise;
    unbiased     where E[e^v] = p_θ(x) (importance and particle bounds, one path): the log of the
                 mean is then a lower bound in expectation, whatever the noise;
    weights      of whole paths, each of which is unbiased: the log of their mean stands in for the
                 mean of their logs and for the jackknife;
    negligible   where the sum of σ²/2 is below a tenth of the standard error of the score.

All else is refused.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrodiff.likelihood.estimates import Estimates
from pyrodiff.likelihood.statistics import log_mean_exp

__all__ = ["SHARE", "as_densities", "excess", "is_noisy", "total_error"]

SHARE = 0.1  # of the standard error of a score, up to which what noise adds to it is negligible


def excess(result: Estimates) -> float:
    """Σ_i σ_i²/2, nats: what normal noise adds at most to a sum of logs of means; NaN: unknown."""
    return float(result.std_error.double().square().sum()) / 2


def total_error(score: Tensor) -> float:
    """√(N Var), the standard error of a sum over samples, (N,)."""
    return math.sqrt(len(score)) * float(score.double().std()) if len(score) > 1 else math.nan


def is_noisy(result: Estimates) -> bool:
    """Whether a mixture of such models would gain from their noise alone."""
    if not bool((result.std_error != 0).any()):
        return False
    return not excess(result) <= SHARE * total_error(result.value)


def _weights(result: Estimates) -> Tensor | None:
    """log w of independent paths from the guide, (N, K), or None."""
    log_w = result.log_weights
    if log_w is None or result.kind == "upper bound" or not bool(log_w.isfinite().all()):
        return None
    return log_w.double()


def as_densities(results: Sequence[Estimates], use: str) -> tuple[Tensor, str]:
    """log p of each model, shape (S, N), float64, and what was done about noise.

    Args:
        results: of the same samples.
        use: what they are for, in the error's words.

    Raises:
        ValueError: noise that is neither unbiased in exp nor negligible.
    """
    values = torch.stack([result.value.detach().cpu().double() for result in results])
    if not any(bool((result.std_error != 0).any()) for result in results):
        return values, "exact values"
    if all(result.unbiased_weights for result in results):
        return values, "exp of each value is unbiased for the density"
    weights = [None if r.unbiased_weights else _weights(r) for r in results]
    if all(r.unbiased_weights or w is not None for r, w in zip(results, weights, strict=True)):
        means = [
            value if log_w is None else log_mean_exp(log_w.cpu())
            for value, log_w in zip(values, weights, strict=True)
        ]
        return torch.stack(means), "log of the mean of the weights, which is unbiased for a density"
    more = sum(0.0 if r.unbiased_weights else excess(r) for r in results) / len(results)
    error = total_error(log_mean_exp(values.T))
    if more <= SHARE * error:
        return values, f"noise adds at most {more:.2g} nats in all to a score of error {error:.2g}"
    raise ValueError(
        f"Expected values without noise, of an estimator that is unbiased in exp, or with noise "
        f"that is negligible for {use}; got {results[0].estimator}, where noise adds up to "
        f"{more:.3g} nats in all and the error is {error:.3g} (a tenth of it is negligible). Use "
        "ImportanceBound, or more calls; compare() needs no exp."
    )
